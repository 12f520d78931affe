"""The process that checks grammars: one per worker, there before it is needed, and only where it is.

Measured with SmolLM2's tokenizer of 49,152 tokens and two workers: the server's processes take 366 MB with
checkers, 56 MB each, and 254 MB where the engine follows no grammars.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest

from container.ranks.submission import EngineSilent
from container.text.model import TextModel
from sagemaker_entry import model_files, wiring
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings
from tests.sagemaker_entry.harness import Server, wait_until, write_model
from tests.sagemaker_entry.test_grammars import ABLE, UNABLE, Engine
from tests.sagemaker_entry.test_service import page, text

__all__ = ["page", "text"]  # fixtures

WORKERS = 2
SETTLED_S = 1.0  # ten times as often as the engine is asked what it can do


def below(pid: int) -> list[int]:
    """Return every process under `pid`."""
    found = [pid]
    for parent in found:
        try:
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        except OSError:
            continue
    return found[1:]


def checkers(server: Server) -> list[int]:
    """Return the processes that check grammars."""
    return [
        pid
        for pid in below(server.process.pid)
        if b"container.text.grammar_child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_an_engine_that_follows_grammars_has_one_checker_per_worker_ahead_of_requests(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_WORKERS=str(WORKERS)) as server:
        wait_until(lambda: len(checkers(server)) == WORKERS, 10, "a checker for each worker")


def test_an_engine_without_grammars_costs_no_process(tmp_path: Path) -> None:
    asked = {"inputs": "hi", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
    with Server(tmp_path, grammar="no", STRONGROOM_WORKERS=str(WORKERS)) as server:
        time.sleep(SETTLED_S)
        assert checkers(server) == []
        assert server.invoke({"inputs": "hi", "parameters": {"max_new_tokens": 2}})[0] == 200
        assert server.invoke(asked)[0] == 422
        assert checkers(server) == []


class Recorded:
    """Stands for the checker."""

    def __init__(self, *_: Any) -> None:
        self.starts = 0

    def start(self) -> None:
        self.starts += 1


class Deaf(Engine):
    """Says nothing at first."""

    silences = 2

    def welcome(self, wait_s: float = 1.0) -> Any:
        if self.silences:
            self.silences -= 1
            raise EngineSilent
        return super().welcome(wait_s)


@pytest.mark.parametrize(("hello", "starts"), [(ABLE, 1), (UNABLE, 0)])
def test_the_checker_waits_for_a_healthy_engine_that_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: TextModel, page: Metrics, hello: Any, starts: int
) -> None:
    made = Recorded()
    monkeypatch.setattr(wiring, "GrammarChecker", lambda *_: made)
    monkeypatch.setattr(wiring, "ENGINE_POLL_S", 0.001)
    engine = Deaf(hello=hello)
    service = Service(Settings(model="/m"), engine, page)
    state = {"healthy": False}
    healthy: Callable[[], bool] = lambda: state["healthy"]  # noqa: E731
    files = model_files.read(str(write_model(tmp_path)))
    warming = gevent.spawn(wiring.warm, service, files, text, healthy)
    gevent.sleep(0.02)
    assert (made.starts, engine.silences) == (0, 2), "an engine that loads was asked"
    state["healthy"] = True
    warming.get(timeout=5)
    assert (made.starts, engine.silences) == (starts, 0)
