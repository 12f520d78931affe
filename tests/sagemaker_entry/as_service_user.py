"""Becomes the product's entry as the service's own user where it is started by root, as a container is.

Owns: the change of user. Must not know: what is served.
Invariant: the server keeps this process's id. It may read every file, as in an image where they are all its
own; that gives no right to another process's memory.
"""

from __future__ import annotations

import os
import sys

from sagemaker_entry.supervisor import SERVICE_ID

RIGHT = "+dac_read_search"


def command(program: list[str]) -> list[str]:
    """Return how to run `program` as the service's user."""
    if os.getuid() != 0:
        return program
    who = [f"--reuid={SERVICE_ID}", f"--regid={SERVICE_ID}", "--clear-groups"]
    return ["setpriv", *who, f"--inh-caps={RIGHT}", f"--ambient-caps={RIGHT}", *program]


def main() -> None:
    whole = command([sys.executable, "-m", "sagemaker_entry", "serve"])
    os.execvp(whole[0], whole)


if __name__ == "__main__":
    main()
