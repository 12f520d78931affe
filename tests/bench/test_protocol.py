"""A driver in a child process, good and bad."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bench.foreign import process_fields
from tests.bench.protocol import Child, EngineLost
from tests.bench.workloads import Request

LIMIT_S = 30.0
ASKED = [Request((1, 2, 3), 4), Request((4,), 2, 0.5)]


@contextmanager
def fake(folder: Path, **options: Any) -> Iterator[tuple[Child, dict[str, Any]]]:
    child = Child([sys.executable, "-m", "tests.bench.drivers.fake"], folder / "log")
    try:
        yield child, options
    finally:
        child.close()


def test_a_driver_loads_and_answers_every_request_with_its_times(tmp_path: Path) -> None:
    with fake(tmp_path, pace_s=0.001) as (child, options):
        told = child.load(tmp_path, options, LIMIT_S)
        assert told["about"]["version"] == "1.0" and told["start_s"] > 0
        got = child.run(ASKED, LIMIT_S)
        assert [t.tokens for t in got] == [4, 2]
        assert got[1].events == ((0.501, 1), (0.502, 1))
        assert child.run(ASKED, LIMIT_S) == got


def test_what_a_library_prints_does_not_reach_the_replies(tmp_path: Path) -> None:
    with fake(tmp_path, prints=True, pace_s=0.0) as (child, options):
        child.load(tmp_path, options, LIMIT_S)
        assert len(child.run(ASKED, LIMIT_S)) == 2
    assert "a library says hello" in (tmp_path / "log").read_text()


def test_a_driver_that_cannot_load_says_why_and_stays_in_reach(tmp_path: Path) -> None:
    with fake(tmp_path) as (child, _):
        with pytest.raises(EngineLost, match="RuntimeError: this machine lacks what it takes"):
            child.load(tmp_path, {"fails": True}, LIMIT_S)
        assert child.load(tmp_path, {}, LIMIT_S)["ok"]


def test_limits_of_the_shell_do_not_reach_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("UNRELATED", "stays")
    child = Child([sys.executable, "-m", "tests.bench.drivers.fake"], tmp_path / "log", {"GIVEN": "too"})
    child.load(tmp_path, {}, LIMIT_S)  # by then it is a process of its own
    environment = Path(f"/proc/{child.roots[0]}/environ").read_bytes().split(b"\0")
    child.close()
    assert b"UNRELATED=stays" in environment and b"GIVEN=too" in environment
    assert not any(entry.startswith(b"OMP_NUM_THREADS") for entry in environment)


def test_an_unknown_message_is_answered_as_a_failure(tmp_path: Path) -> None:
    with fake(tmp_path) as (child, _), pytest.raises(EngineLost, match="unknown message `sing`"):
        child.ask({"do": "sing"}, LIMIT_S)


def test_a_driver_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    with fake(tmp_path, dies=True) as (child, options):
        child.load(tmp_path, options, LIMIT_S)
        began_s = time.monotonic()
        with pytest.raises(EngineLost, match="it ended"):
            child.run(ASKED, LIMIT_S)
        assert time.monotonic() - began_s < LIMIT_S / 2
        with pytest.raises(EngineLost, match="it ended"):
            child.run(ASKED, LIMIT_S)


def test_silence_is_noticed_after_the_limit(tmp_path: Path) -> None:
    with fake(tmp_path, pace_s=2.0) as (child, options):
        child.load(tmp_path, options, LIMIT_S)
        with pytest.raises(EngineLost, match="no reply within 0 s"):
            child.run(ASKED, 0.05)


def test_a_paused_driver_computes_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    with fake(tmp_path, pace_s=0.0) as (child, options):
        child.load(tmp_path, options, LIMIT_S)
        child.pause()
        deadline_s = time.monotonic() + LIMIT_S
        while (fields := process_fields(child.roots[0])) and fields[0] != "T":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        with pytest.raises(EngineLost, match="no reply"):
            child.run(ASKED, 0.2)
        child.resume()
        # the reply to what was asked while it stood comes first
        assert len(child.run(ASKED, LIMIT_S)) == 2


def test_closing_leaves_no_process_even_when_it_is_stopped(tmp_path: Path) -> None:
    with fake(tmp_path) as (child, _):
        pid = child.roots[0]
        os.kill(pid, signal.SIGSTOP)
    assert process_fields(pid) is None
