"""The container's entry: `serve` or `train`, as SageMaker passes it.

Owns: the dispatch and the operator's error lines. Must not know: how anything is served.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sagemaker_entry import children, log, settings, supervisor

EXIT_USAGE = 2


def main(arguments: Sequence[str]) -> int:
    """Run the verb in `arguments`; return the exit code."""
    if list(arguments) == ["train"]:
        return _stop("`train` is not part of this version", "start the container with `serve`")
    if list(arguments) != ["serve"]:
        return _stop("one argument is expected", "start the container with `serve`")
    try:
        chosen, ignored = settings.read(os.environ)
    except settings.SettingsError as error:
        return _stop(str(error), error.hint)
    log.set_level(chosen.log_level)
    for name in ignored:
        log.write("warning", "setting_ignored", name=name)
    try:
        running = supervisor.Supervisor(chosen, supervisor.Commands(), os.environ)
    except OSError as error:
        port = settings.variable("port")
        return _stop(
            f"cannot listen on port {chosen.port}: {os.strerror(error.errno or 0).lower()}", f"set `{port}`"
        )
    supervisor.drop_privileges()
    children.undumpable()
    return running.run()


def _stop(message: str, hint: str) -> int:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
