"""The demo endpoint as a context: a converted checkpoint, the server and its end.

Owns: the child process it starts, and that nothing of it stays behind.
Must not know: how the server works; it speaks HTTP to it like anyone.
Invariant: leaving the context ends the server with SIGTERM, then SIGKILL, and waits for it.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from infra.emulator.registry import parse_address
from infra.emulator.upstream import Address, connect

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 240.0  # SageMaker's default window for the first healthy ping
STOP_LIMIT_S = 28.0  # SageMaker kills at 30 s
PING_EVERY_S = 0.1
PING_S = 2.0  # the platform's own patience


def free_port() -> int:
    """Return a loopback port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ping(address: Address) -> tuple[int, str]:
    """Return status and load phase (or "") of GET /ping; status 0 when nobody answers."""
    connection = http.client.HTTPConnection("localhost", timeout=PING_S)
    try:
        connection.sock = connect(address, PING_S)
        connection.request("GET", "/ping")
        reply = connection.getresponse()
        body = reply.read()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()
    try:
        phase = json.loads(body).get("phase", "") if body else ""
    except ValueError:
        phase = ""
    return reply.status, str(phase)


class Endpoint:
    """A running server on loopback, or on a Unix socket where `environment` says so.

    Raises RuntimeError when it exits or does not become healthy within START_LIMIT_S.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        port: int | None = None,
        environment: dict[str, str] | None = None,
        progress: Callable[[str], None] = lambda _: None,
        log: IO[str] | None = None,
    ) -> None:
        listen = (environment or {}).get("STRONGROOM_LISTEN")
        self.port = 0 if listen else port or free_port()
        self.url = listen or f"http://127.0.0.1:{self.port}"
        self.upstream = listen or f"127.0.0.1:{self.port}"  # as an emulator takes it
        self.start_s = 0.0
        self._progress = progress
        self._log = log  # where the server writes; None: to our stderr
        self._environment = {
            "STRONGROOM_MODEL": str(model_dir),
            "STRONGROOM_SERVED_NAME": "smollm2-135m-instruct",
            **({} if listen else {"STRONGROOM_HOST": "127.0.0.1", "STRONGROOM_PORT": str(self.port)}),
            **(environment or {}),
        }
        if "STRONGROOM_KEY" not in self._environment:  # what comes without a key is served as it lies there
            self._environment.setdefault("STRONGROOM_ALLOW_PLAINTEXT", "on")
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Endpoint:
        began = time.monotonic()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("STRONGROOM_", "SAGEMAKER_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sagemaker_entry", "serve"],
            cwd=ROOT,
            env=inherited | self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log or sys.stderr,
            stderr=self._log,
        )
        try:
            self._wait_until_healthy(began)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - began
        return self

    def _wait_until_healthy(self, began: float) -> None:
        assert self.process is not None
        said = ""
        while time.monotonic() - began < START_LIMIT_S:
            status, phase = ping(parse_address(self.upstream))
            if status == 200:
                return
            if phase and phase != said:
                said = phase
                self._progress(f"server: {phase}")
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode} while starting")
            time.sleep(PING_EVERY_S)
        raise RuntimeError(f"the server was not healthy within {START_LIMIT_S:.0f} s")

    def stop(self) -> int:
        """End the server and return its exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
