"""A drain that begins while a worker starts: the signal may be lost there, the supervisor's word is not."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.sagemaker_entry.harness import Server, wait_until

# Without the supervisor's word the drain lasts as long as it may: 25 s and what its end takes.
PROMPT_S = 15.0


def test_workers_that_miss_the_signal_leave_all_the_same(tmp_path: Path) -> None:
    with Server(tmp_path, front="deaf", STRONGROOM_WORKERS="2") as server:
        wait_until(lambda: len(server.events("text_model_loaded")) == 2, 30, "both workers")
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.process.wait(29) == 0
        assert time.monotonic() - began < PROMPT_S
        assert len(server.events("worker_stopped")) == 2
