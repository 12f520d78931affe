"""Each detector over an observation with one fault, and the report: who reads it learns what was found."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from infra.image.container import Process
from infra.privacy import kernel, plan, report
from infra.privacy.calling import BROKEN, LEFT, Outcome
from infra.privacy.detectors import DETECTORS, TABLE, Observed
from infra.privacy.network import OPENED, SENT, Packet
from infra.privacy.search import Found, Search
from infra.privacy.watching import betrayed

NOTHING = Found("somewhere", frozenset())
HIT = Found("somewhere", frozenset({"0001"}))
LOCKED = {"Seccomp": "2", "NoNewPrivs": "1"}
ZERO = dict.fromkeys((*OPENED, *SENT), 0)
ROUNDS = kernel.Asked(
    3,
    {**kernel.MADE_A_ROUND, kernel.ROUND: 1, kernel.WITHIN: 2},
    {**kernel.REFUSED_A_ROUND, kernel.ROUND: 1},
)
MADE = plan.make(46, 23)


def answered(call: plan.Call) -> Outcome:
    return Outcome(call, LEFT if call.leave else min(call.expected), b"")


SOUND = Observed(
    outcomes=[answered(call) for call in MADE.calls],
    canaries=23,
    counters=ZERO,
    packets={Packet("192.0.2.2", "tcp", "192.0.2.1", 4000): 9},
    packets_lost=0,
    asked=ROUNDS,
    port=False,
    lockdown="on",
    processes=(Process(1, LOCKED, True, "0"),),
    log=NOTHING,
    log_bytes=100,
    metrics=NOTHING,
    metrics_status=200,
    answers=(),
    files=(),
    changes=(),
    memory=(NOTHING,),
    memory_after_s=60.0,
    exit_code=0,
)


def failed(seen: Observed) -> list[int]:
    return [result.number for result in TABLE.run(seen) if not result.passed]


def test_a_sound_observation_passes_every_detector() -> None:
    assert failed(SOUND) == [] and len(TABLE.run(SOUND)) == DETECTORS


def one_more(**refused: int) -> kernel.Asked:
    return dataclasses.replace(ROUNDS, refused={**ROUNDS.refused, **refused})


FAULTS: list[tuple[dict[str, Any], int]] = [
    ({"outcomes": ()}, 1),
    ({"outcomes": [Outcome(MADE.calls[0], BROKEN, b"")]}, 1),
    ({"outcomes": [Outcome(MADE.calls[0], 500, b"")]}, 1),
    ({"exit_code": 137}, 1),
    *(({"counters": {**ZERO, name: 1}}, 2) for name in OPENED),
    *(({"counters": {**ZERO, name: 1}}, 3) for name in SENT),
    ({"counters": dict.fromkeys((*OPENED, *SENT[1:]), 0)}, 3),
    *(({"packets": {Packet("a", kind, "b", 1): 1}}, 4) for kind in ("syn", "udp", "dns", "icmp", "other")),
    ({"packets_lost": 1}, 4),
    ({"asked": None}, 5),
    ({"asked": one_more(connect=2)}, 5),
    ({"asked": kernel.Asked(3, {kernel.WITHIN: 1}, {})}, 5),
    ({"asked": dataclasses.replace(ROUNDS, lost=1)}, 5),
    ({"port": True}, 5),
    ({"lockdown": "off"}, 6),
    ({"processes": ()}, 6),
    ({"processes": (Process(1, LOCKED | {"Seccomp": "0"}, True, "0"),)}, 6),
    ({"processes": (Process(1, LOCKED | {"NoNewPrivs": "0"}, True, "0"),)}, 6),
    ({"log": HIT}, 7),
    ({"log": Found("log", frozenset(), 1)}, 7),
    ({"log_bytes": 0}, 7),
    ({"metrics": HIT}, 8),
    ({"metrics_status": 503}, 8),
    ({"answers": (HIT,)}, 9),
    ({"files": (HIT,)}, 10),
    ({"changes": ("A /tmp/x",)}, 11),
]


@pytest.mark.parametrize(("fault", "number"), FAULTS)
def test_each_fault_is_found_by_its_detector_alone(fault: dict[str, Any], number: int) -> None:
    assert failed(dataclasses.replace(SOUND, **fault)) == [number]


def test_every_detector_has_a_fault() -> None:
    assert {number for _, number in FAULTS} == set(range(1, DETECTORS + 1))


def reply(kind: str, status: int, holds: str) -> tuple[Found, ...]:
    call = next(call for call in MADE.calls if call.kind == kind and call.canary)
    other = next(canary for canary in MADE.canaries if canary != call.canary)
    text = {"own": call.canary or "", "other": other, "none": ""}[holds]
    return betrayed([Outcome(call, status, text.encode())], Search(MADE.mark))


@pytest.mark.parametrize(
    ("kind", "status", "holds", "betrays"),
    [
        ("chat", 200, "own", False),
        ("chat", 200, "other", True),
        ("chat", 200, "none", False),
        ("wrong type", 400, "own", True),
        ("wrong type", 400, "other", True),
        (plan.NAMED, 400, "own", False),
        (plan.NAMED, 400, "other", True),
    ],
)
def test_an_answer_holds_its_callers_words_alone(kind: str, status: int, holds: str, betrays: bool) -> None:
    assert bool(reply(kind, status, holds)) is betrays


FACTS = {"date": "today", "subject": {"image id": "sha256:abc"}, "host": {"kernel": "Linux"}}


def test_the_report_names_the_image_the_commands_and_what_was_found() -> None:
    bad = dataclasses.replace(SOUND, changes=("A /tmp/x",), memory=(HIT,))
    evidence = report.document(FACTS, {"Sound": SOUND, "Bad": bad}, ["scripts/prove-privacy"])
    assert not evidence["ok"] and evidence["runs"]["Sound"]["ok"]
    assert not evidence["runs"]["Bad"]["memory"]["within_bar"]
    page = report.markdown(evidence)
    for said in (
        "sha256:abc",
        "A /tmp/x",
        "scripts/prove-privacy",
        "something was found",
        "**over** the bar",
    ):
        assert said in page
    assert MADE.mark not in page and MADE.mark not in json.dumps(evidence)
    sound = report.document(FACTS, {"Sound": SOUND}, [])
    assert sound["ok"] and "nothing was found" in report.markdown(sound)
    assert not report.document(FACTS, {}, [])["ok"], "evidence of no run"
