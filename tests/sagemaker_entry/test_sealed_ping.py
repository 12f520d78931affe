"""`/ping` answers while a sealed package is proved and opened, within the platform's patience."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.sagemaker_entry import sealed_model
from tests.sagemaker_entry.harness import wait_until
from tests.sagemaker_entry.sealed_model import Made

PATIENCE_S = 2.0  # the platform's, for one ping
TICK_S = 0.01
MORE_BYTES = 128 * 1024 * 1024  # proved before anything is opened, so that there is something to wait for
STARTS = 3  # a machine may take its cores away for as long as a start lasts
LOADING = {"opening", "weights"}


class Stalls:
    """How long this process did not run although it wanted to: what the machine takes, not the endpoint."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._woken_s = time.monotonic()
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def lost_s(self) -> float:
        """Return the sum up to now."""
        with self._turn:
            return self._lost_s + max(0.0, time.monotonic() - self._woken_s - TICK_S)

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            with self._turn:
                now_s = time.monotonic()
                self._lost_s += max(0.0, now_s - self._woken_s - TICK_S)
                self._woken_s = now_s


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "plain").mkdir()
    save_file({"more": np.zeros(MORE_BYTES, np.uint8)}, folder / "plain" / "more.safetensors")
    return sealed_model.make(folder)


def test_ping_answers_within_the_platforms_patience_while_the_package_is_opened(
    made: Made, tmp_path: Path
) -> None:
    told: list[dict[str, str]] = []
    for number in range(STARTS):
        told += pinged(made, tmp_path / str(number))
        if any(each["phase"] in LOADING for each in told):
            break
    assert any(each["phase"] in LOADING for each in told), "it never answered while it was loading"
    assert {each["seal"] for each in told} == {"sealed"}
    assert {each["phase"] for each in told} <= {"none", *LOADING, "probe", "warmup"}


def pinged(made: Made, directory: Path) -> list[dict[str, str]]:
    """Return what a start says until it is healthy, each time soon enough."""
    server = made.server(directory, STRONGROOM_VERIFY="full")
    server.start()
    told: list[dict[str, str]] = []
    try:
        wait_until(lambda: server.events("worker_started"), 100, "somebody to answer")
        with Stalls() as stalls:
            status = 503
            while status != 200:
                began_s, lost_s = time.monotonic(), stalls.lost_s()
                status, _, body = server.request("GET", "/ping")
                took_s = time.monotonic() - began_s - (stalls.lost_s() - lost_s)
                assert took_s < PATIENCE_S, f"a ping took {took_s:.2f} s"
                assert status in (200, 503)
                if status == 503:
                    told.append(json.loads(body))
    finally:
        server.stop()
    return told
