"""A rank of the engine that loads from a sealed package: container.ranks' processes with an opener put in.

Owns: the descriptors on the command line. Must not know: how a package is opened (opening), how a rank runs.
Invariant: what is told here decides that the start is sealed; the rank's own loader never sees a path to a
plain file.

    python -m sagemaker_entry.sealed.rank engine   --plan-fd N --board-fd N --unlock-fd N [--key-fd N] ...
    python -m sagemaker_entry.sealed.rank follower --plan-fd N --board-fd N --unlock-fd N [--key-fd N] ...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from container.ranks import follower, main
from container.ranks.assembly import load
from container.ranks.process import say
from sagemaker_entry.sealed.opening import Descriptors, opening
from sagemaker_entry.sealed.plan import MAX_BYTES, decode, rank_command

ROLES = ("engine", "follower")


def run(arguments: Sequence[str]) -> int:
    """Run the rank and return its exit status."""
    parser = argparse.ArgumentParser(prog="sagemaker_entry.sealed.rank", allow_abbrev=False)
    parser.add_argument("role", choices=ROLES)
    for name in ("plan", "board", "unlock"):
        parser.add_argument(f"--{name}-fd", type=int, required=True)
    parser.add_argument("--key-fd", type=int)
    own, rest = parser.parse_known_args(arguments)
    plan = decode(os.pread(own.plan_fd, MAX_BYTES, 0))
    stderr_fd = os.dup(2)  # a rank silences its own before it loads
    opener = partial(
        opening, plan, Descriptors(own.board_fd, own.unlock_fd, own.key_fd), partial(say, stderr_fd)
    )
    loader = partial(load, opening=opener)
    if own.role == "follower":
        return follower.main(rest, loader)
    fds = {"--plan-fd": own.plan_fd, "--board-fd": own.board_fd, "--unlock-fd": own.unlock_fd}
    if own.key_fd is not None:
        fds["--key-fd"] = own.key_fd
    return main.main(rest, loader, rank_command("follower", fds), tuple(fds.values()))


if __name__ == "__main__":
    status = run(sys.argv[1:])
    if sys.argv[1] == "follower":
        os._exit(status)  # without finalizing, as container.ranks.follower
    sys.exit(status)
