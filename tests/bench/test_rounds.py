"""Engines in turn: the order, repeats of disturbed runs, engines that fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.bench import rounds
from tests.bench.figures import figures
from tests.bench.foreign import CpuSample, process_fields
from tests.bench.rounds import Contestant, Fleet, Job, interleaved, undisturbed
from tests.bench.workloads import Text, requests

TEXT = Text(range(5000))


def silent(_: str) -> None:
    """Tell nobody."""


def shares(monkeypatch: pytest.MonkeyPatch, *foreign: float) -> None:
    """Make the runs to come look as if others had used these shares of the CPU, the last one for ever."""

    def samples() -> Iterator[CpuSample]:
        for share in [*foreign, *[foreign[-1]] * 1000]:
            yield CpuSample(0, 0, 0)
            yield CpuSample(1000, round(1000 * share), 0)

    source = samples()
    monkeypatch.setattr(rounds, "sample", lambda _: next(source))


def counted() -> Callable[[], dict[str, Any]]:
    calls = iter(range(100))
    return lambda: {"run": next(calls)}


def test_a_quiet_run_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.03)
    made = undisturbed(counted(), silent)
    assert (made["run"], made["attempts"], made["noisy"], made["foreign_share"]) == (0, 1, False, 0.03)


def test_a_disturbed_run_is_done_again_until_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.5, 0.031, 0.01)
    told: list[str] = []
    made = undisturbed(counted(), told.append)
    assert (made["run"], made["attempts"], made["noisy"]) == (2, 3, False)
    assert len(told) == 2


def test_of_runs_that_all_were_disturbed_the_least_is_kept_and_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares(monkeypatch, 0.5, 0.2, 0.4, 0.3)
    made = undisturbed(counted(), silent)
    assert (made["run"], made["attempts"], made["noisy"], made["foreign_share"]) == (1, 4, True, 0.2)


def fake(name: str, **options: Any) -> Contestant:
    options = {"pace_s": 0.001} | options
    return Contestant(name, "fake", Path(sys.executable), Path(), options, need_mib=50.0)


def job(name: str) -> Job:
    return Job(name, partial(requests, name, TEXT, quick=True), partial(figures, name))


def test_engines_take_turns_at_each_workload_and_the_first_one_rotates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares(monkeypatch, 0.0)
    both = [fake("a"), fake("b")]
    with Fleet(tmp_path, TEXT, silent) as fleet:
        records = list(interleaved(fleet, both, [job("W1"), job("W2")], 2, silent))
        pids = [fleet.ready(one).roots[0] for one in both]
    order = [(r["round"], r["workload"], r["engine"]) for r in records]
    first = [(1, "W1", "a"), (1, "W1", "b"), (1, "W2", "a"), (1, "W2", "b")]
    assert order == first + [(2, w, e) for w in ("W1", "W2") for e in ("b", "a")]
    assert all(r["figures"] and r["peak_rss_mib"] > 0 and not r["noisy"] for r in records)
    assert fleet.told["a"]["about"]["version"] == "1.0" and len(fleet.told["a"]["start_s"]) == 1
    assert [process_fields(pid) for pid in pids] == [None, None]


def test_without_room_for_all_each_does_its_workloads_in_one_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares(monkeypatch, 0.0)
    monkeypatch.setattr(rounds, "available_mib", lambda: 100.0)
    told: list[str] = []
    with Fleet(tmp_path, TEXT, told.append) as fleet:
        records = list(interleaved(fleet, [fake("a"), fake("b")], [job("W1"), job("W2")], 1, silent))
    assert [(r["engine"], r["workload"]) for r in records] == [(e, w) for e in "ab" for w in ("W1", "W2")]
    assert "unloading a: memory is short" in told


def test_only_the_engine_whose_turn_it_is_may_compute(tmp_path: Path) -> None:
    with Fleet(tmp_path, TEXT, silent) as fleet:
        first = fleet.ready(fake("a"))
        second = fleet.ready(fake("b"))
        states = [process_fields(child.roots[0]) for child in (first, second)]
        assert states[0] is not None and states[0][0] == "T"
        assert states[1] is not None and states[1][0] != "T"


def test_a_server_that_watches_itself_is_never_stopped(tmp_path: Path) -> None:
    with Fleet(tmp_path, TEXT, silent) as fleet:
        server = fleet.ready(replace(fake("server"), pauses=False))
        fleet.ready(fake("other"))
        fields = process_fields(server.roots[0])
        assert fields is not None and fields[0] != "T"


def test_a_failing_engine_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares(monkeypatch, 0.0)
    contestants = [
        fake("good"),
        fake("short", short=True),
        fake("absent", fails=True),
        fake("dies", dies=True),
    ]
    with Fleet(tmp_path, TEXT, silent) as fleet:
        records = list(interleaved(fleet, contestants, [job("W1")], 4, silent))
    errors = {r["engine"]: r["error"] for r in records if "error" in r}
    assert errors["short"] == "request 0 made 15 tokens, not 16"
    assert "this machine lacks what it takes" in errors["absent"]
    assert "it ended" in errors["dies"]
    tries = {name: sum(r["engine"] == name for r in records) for name in ("good", "short", "absent", "dies")}
    assert tries == {"good": 4, "short": 2, "absent": 2, "dies": 2}


def test_starts_are_timed_from_the_process_on_and_a_failing_one_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares(monkeypatch, 0.0)
    records = list(rounds.starts([fake("a"), fake("absent", fails=True)], tmp_path, 2, silent))
    assert [(r["engine"], r["round"]) for r in records] == [("a", 1), ("absent", 1), ("a", 2)]
    assert records[0]["figures"]["start_s"] > 0 and "lacks what it takes" in records[1]["error"]


def test_repeats_of_a_disturbed_run_read_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.5)
    seen: list[int] = []

    def make(number: int) -> Any:
        seen.append(number)
        return requests("W1", TEXT, number, quick=True)

    with Fleet(tmp_path, TEXT, silent) as fleet:
        work = Job("W1", make, partial(figures, "W1"))
        list(interleaved(fleet, [fake("a")], [work], 2, silent))
    assert len(set(seen)) == len(seen) == 8
