"""The container's entry: `serve` or `train`, as SageMaker passes it.

Owns: the dispatch and the operator's error lines. Must not know: how anything is served.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from model_package.refusal import KeyRefused
from model_package.secret import HardeningError
from sagemaker_entry import children, log, settings, supervisor
from sagemaker_entry.listening import ListenRefused

EXIT_USAGE = 2


def main(arguments: Sequence[str]) -> int:
    """Run the verb in `arguments` and return the exit code; root gives its rights up before anything else."""
    try:
        supervisor.drop_privileges()
    except PermissionError:
        return _stop(
            "started as root, but not allowed to go on as another user",
            f"start with `--user {supervisor.SERVICE_ID}`, or leave the capabilities SETUID and SETGID",
        )
    os.umask(0o077)
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
    children.undumpable()  # before a key arrives
    try:
        running = supervisor.Supervisor(chosen, supervisor.Commands(), os.environ)
    except (settings.SettingsError, ListenRefused) as error:
        return _stop(str(error), error.hint)
    except (KeyRefused, HardeningError) as refused:
        _stop(refused.message, refused.hint)
        return supervisor.EXIT_KEY
    return running.run()


def _stop(message: str, hint: str) -> int:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
