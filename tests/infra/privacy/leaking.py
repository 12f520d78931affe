"""The real supervisor and front, which leak what they are asked in one way: `--leak WAY`.

Owns: the ways. Must not know: what is looked for.
The other options are those of tests.sagemaker_entry.launch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sagemaker_entry import front, strict_json
from sagemaker_entry.supervisor import front_command
from tests.sagemaker_entry import quick_front

ELSEWHERE = "198.51.100.7"  # RFC 5737: nobody's
HEARD: list[bytes] = []


def connect(_: bytes) -> None:
    with socket.socket() as opened:
        opened.setblocking(False)
        opened.connect((ELSEWHERE, 443))


def datagram(_: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.sendto(b"x", (ELSEWHERE, 9))


def look_up(_: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.sendto(b"x", (ELSEWHERE, 53))


def local(_: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        opened.connect("/run/somebody")


def stderr(body: bytes) -> None:
    os.write(2, b64encode(body))


def file(body: bytes) -> None:
    Path(os.environ["TMPDIR"], "kept").write_bytes(body)


def shared(body: bytes) -> None:
    Path("/dev/shm", f"strongroom-leak-{os.getpid()}").write_bytes(body)


def nothing(_: bytes) -> None:
    """What the wrappers below leak has been heard already."""


def breaks(_: bytes) -> None:
    raise RuntimeError("broken on purpose")


WAYS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (connect, datagram, look_up, local, stderr, file, shared, nothing, breaks)
} | {"metrics": nothing, "answer": nothing}


def leak(way: str) -> None:
    """Have this process leak from now on."""
    real: Callable[[bytes], Any] = strict_json.loads

    def loads(body: bytes) -> Any:
        HEARD.append(body)
        caught = contextlib.suppress(OSError) if way != "breaks" else contextlib.nullcontext()
        with caught:
            WAYS[way](body)
        return real(body)

    strict_json.loads = loads
    if way == "metrics":
        from sagemaker_entry.metrics import Metrics

        text = Metrics.text
        Metrics.text = lambda *given: text(*given) + f"# {HEARD!r}\n"  # type: ignore[method-assign]
    if way == "answer":
        from flask import Response

        data = Response.set_data
        heard = lambda: b"".join(HEARD[-40:])  # noqa: E731
        Response.set_data = lambda self, value: data(  # type: ignore[method-assign]
            self, (value.encode() if isinstance(value, str) else value) + b" " + heard()
        )


def command(way: str, *fds: int) -> list[str]:
    """Return the command line of the leaking front."""
    listen_fd, settings_fd, door_fd, heartbeat_fd, metrics_fd = fds
    usual = front_command(listen_fd, settings_fd, door_fd, heartbeat_fd, metrics_fd)
    module = usual.index("-m") + 1
    return [*usual[:module], "tests.infra.privacy.leaking", "front", way, *usual[module + 1 :]]


def main() -> int:
    """Be the front, or the supervisor that starts it."""
    if sys.argv[1] == "front":
        way, rest = sys.argv[2], sys.argv[3:]

        def build(*given: Any) -> Any:
            leak(way)
            return front.build_application(*given)

        front.run(rest, build)
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--leak", required=True, choices=WAYS)
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = [*rest, "--front", "quick"]
    quick_front.command = lambda *fds: command(chosen.leak, *fds)
    from tests.sagemaker_entry import launch

    return launch.main()


if __name__ == "__main__":
    sys.exit(main())
