"""A running endpoint for the outside views: started once, spoken to by HTTP only."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Running:
    """Addresses of the endpoint under test and where its log goes."""

    url: str
    port: int
    emulator: dict[str, Any]
    openai: dict[str, Any]  # base URL and bearer token of the emulator's OpenAI route
    log: Path
    process: subprocess.Popen[str] | None


def serve(log: Path, *settings: str, store: Path | None = None) -> Running:
    """Start the demo endpoint and wait for its line of JSON."""
    arguments = [sys.executable, "-m", "scripts.serve", "--port", "0", "--emulator"]
    if store is not None:
        arguments += ["--store", str(store)]
    for setting in settings:
        arguments += ["--set", setting]
    with log.open("w") as sink:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=sink, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the endpoint did not start: {log.read_text()[-2000:]}"
    ready = json.loads(line)
    return Running(ready["url"], ready["port"], ready["emulator"], ready["openai"], log, process)


def end(running: Running) -> int:
    """Stop an endpoint started by `serve` and return its exit status."""
    assert running.process is not None and running.process.stdout is not None
    running.process.send_signal(signal.SIGTERM)
    status = running.process.wait(40)
    running.process.stdout.close()
    return status


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Iterator[Running]:
    """The demo model with default settings."""
    running = serve(tmp_path_factory.mktemp("endpoint") / "log")
    yield running
    assert end(running) == 0


@pytest.fixture
def own_endpoint(tmp_path: Path, demo_checkpoint: Path) -> Iterator[Running]:
    """An endpoint that the test may harm."""
    running = serve(tmp_path / "log", "STRONGROOM_WORKERS=1")
    yield running
    assert running.process is not None
    if running.process.poll() is None:
        end(running)
    elif running.process.stdout is not None:
        running.process.stdout.close()
