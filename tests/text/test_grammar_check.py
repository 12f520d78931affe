"""Grammars checked in a process that may die: reasons, bounds, replacement, memory of results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from container.text import grammar_check
from container.text.grammar_check import GrammarChecker
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.schema import schema_text
from tests.text import build

ROOT = Path(__file__).parents[2]
TOKENIZER = build.byte_level().to_str().encode()
END = build.byte_level().token_to_id("</s>")
NEST = "(((a{100}){100}){100}){100}"  # takes seconds and gigabytes to follow
INTEGER = schema_text(
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, closed=True
)


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(TOKENIZER, [END])
    made.start()
    yield made
    made.close()


def reason(checker: GrammarChecker, kind: str, text: Any) -> tuple[GrammarReason, str | None] | None:
    try:
        checker.check(kind, text if isinstance(text, str) else json.dumps(text))
    except GrammarError as error:
        return error.reason, error.keyword
    return None


def forks_of(pid: int) -> list[int]:
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", {}),
        ("json_schema", {"type": "object"}),
        ("json_schema", {"type": "string", "format": "date-time"}),
        ("json_schema", {"$defs": {"t": {"properties": {"c": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"}),
        ("regex", "(a+)+b"),
        ("regex", r"[a-z]+/\d{1,3}"),
        ("lark", 'start: "a" /b+/'),
    ],
)  # fmt: skip
def test_a_grammar_that_can_be_followed_is_accepted(checker: GrammarChecker, kind: str, text: Any) -> None:
    assert reason(checker, kind, text) is None


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("json_schema", {"type": "string", "pattern": "a("}, (GrammarReason.INVALID_REGEX, "pattern")),
        (
            "json_schema",
            {"format": "nonsense", "type": "string"},
            (GrammarReason.UNSUPPORTED_KEYWORD, "format"),
        ),
        ("json_schema", {"not": {}}, (GrammarReason.UNSUPPORTED_KEYWORD, None)),
        (
            "json_schema",
            {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]},
            (GrammarReason.UNSUPPORTED_KEYWORD, "oneOf"),
        ),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, (GrammarReason.UNSATISFIABLE, None)),
        ("json_schema", {"type": "string", "pattern": "a(?=b)"}, (GrammarReason.REGEX_FEATURE, "pattern")),
        ("json_schema", "{", (GrammarReason.NOT_COMPILED, None)),
        ("regex", r"(a)\1", (GrammarReason.REGEX_FEATURE, None)),
        ("regex", "(?<=a)b", (GrammarReason.REGEX_FEATURE, None)),
        ("regex", "a(", (GrammarReason.INVALID_REGEX, None)),
        ("regex", "(" * 30_000 + ")" * 30_000, (GrammarReason.INVALID_REGEX, None)),
        ("lark", "start: start", (GrammarReason.UNSATISFIABLE, None)),
        ("lark", "nonsense", (GrammarReason.NOT_COMPILED, None)),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_with_its_reason(
    checker: GrammarChecker, kind: str, text: Any, expected: Any
) -> None:
    assert reason(checker, kind, text) == expected


def test_a_cost_hidden_behind_the_first_letter_is_found(checker: GrammarChecker) -> None:
    found = reason(checker, "regex", f"b{NEST}")
    assert found is not None
    assert found[0] in {GrammarReason.TIME, GrammarReason.TOO_COMPLEX, GrammarReason.RESOURCES}


def test_a_grammar_that_explodes_is_answered_in_time_and_hurts_nobody() -> None:
    checker = GrammarChecker(TOKENIZER, [END])
    checker.start()
    pid = checker.pid
    assert pid is not None
    outcomes: list[Any] = []
    bombs = [
        threading.Thread(target=lambda n=n: outcomes.append(reason(checker, "regex", f"{NEST}{'b' * n}")))
        for n in range(3)
    ]
    try:
        for bomb in bombs:
            bomb.start()
        asked = 0
        while any(bomb.is_alive() for bomb in bombs):
            started_s = time.monotonic()
            assert reason(checker, "regex", f"a{asked}") is None
            assert time.monotonic() - started_s < 0.9, "a harmless grammar waited for the harmful ones"
            asked += 1
        for bomb in bombs:
            bomb.join()
        assert len(outcomes) == 3
        allowed = {GrammarReason.TIME, GrammarReason.TOO_COMPLEX, GrammarReason.RESOURCES}
        assert all(outcome is not None and outcome[0] in allowed for outcome in outcomes)
        assert checker.pid == pid, "the process that holds the tokenizer was replaced"
        time.sleep(0.3)
        assert forks_of(pid) == [], "a fork outlived its alarm"
    finally:
        checker.close()


def test_a_child_that_was_killed_is_replaced_for_the_next_request() -> None:
    checker = GrammarChecker(TOKENIZER, [END])
    try:
        assert reason(checker, "regex", "a") is None
        first = checker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while Path(f"/proc/{first}/stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reason(checker, "regex", "b") is None
        assert checker.pid != first
        assert gone(first)
    finally:
        checker.close()


def test_a_child_that_does_not_answer_is_given_up_in_time() -> None:
    checker = GrammarChecker(TOKENIZER, [END], build_s=0.2)
    checker.start()
    pid = checker.pid
    assert pid is not None
    try:
        os.kill(pid, signal.SIGSTOP)
        started_s = time.monotonic()
        assert reason(checker, "regex", "a") == (GrammarReason.TIME, None)
        assert time.monotonic() - started_s < 1
        os.kill(pid, signal.SIGCONT)
        assert reason(checker, "regex", "a") is None, "a result of the moment was remembered"
    finally:
        checker.close()


def test_closing_leaves_no_process_and_can_be_repeated() -> None:
    checker = GrammarChecker(TOKENIZER, [END])
    checker.start()
    pid = checker.pid
    assert pid is not None
    checker.close()
    checker.close()
    assert gone(pid)
    assert reason(checker, "regex", "a") == (GrammarReason.UNAVAILABLE, None)


@pytest.mark.parametrize("tokenizer", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_the_library_cannot_read_makes_grammars_unavailable_and_is_tried_once(
    tokenizer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = GrammarChecker(tokenizer, [])
    try:
        with pytest.raises(GrammarError) as caught:
            checker.start()
        assert caught.value.reason is GrammarReason.UNAVAILABLE
        monkeypatch.setattr(grammar_check, "Child", None)  # starting another would fail otherwise
        assert reason(checker, "regex", "a") == (GrammarReason.UNAVAILABLE, None)
    finally:
        checker.close()


def test_results_are_remembered_up_to_a_bound(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(grammar_check, "REMEMBERED", 3)
    monkeypatch.setattr(checker, "_known", type(checker._known)())

    def ask(request: dict[str, Any], *_: Any) -> dict[str, Any]:
        asked.append(request["text"])
        return {"reason": request["text"]} if request["text"] in set(GrammarReason) else {}

    monkeypatch.setattr(checker, "_ask", ask)
    for text in ("a", "b", "a", "invalid_regex", "invalid_regex", "a"):
        reason(checker, "regex", text)
    assert asked == ["a", "b", "invalid_regex"]
    assert reason(checker, "regex", "invalid_regex") == (GrammarReason.INVALID_REGEX, None)
    reason(checker, "lark", "a")
    assert asked[3:] == ["a"], "another kind is another grammar"
    assert len(checker._known) == 3
    reason(checker, "regex", "b")
    assert asked[4:] == ["b"], "the one not used for longest was dropped"
    for _ in range(2):
        reason(checker, "regex", "time")
    assert asked[5:] == ["time", "time"], "what the machine's state may have caused is asked again"


def test_the_child_has_no_environment_and_no_file_but_its_socket(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = checker.pid
    process = Path(f"/proc/{pid}")
    assert process.joinpath("environ").read_bytes() == b""
    files = {path.name: os.readlink(path) for path in process.joinpath("fd").iterdir()}
    assert files.pop("0").startswith("socket:")
    assert files == {"1": os.devnull, "2": os.devnull}
    limits = process.joinpath("limits").read_text()
    assert "Max core file size        0 " in limits
    assert "Max file size             0 " in limits


def test_the_front_never_imports_the_grammar_library() -> None:
    script = (
        "import sys, container.text.grammar_check, container.text.schema; "
        "print({'llguidance', 'jsonschema', 'tokenizers'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("kind", "text", "answer", "holds"),
    [
        ("regex", "a+/?", "aa/", True),
        ("regex", "a+/?", "aab", False),
        ("regex", "a{3}", "aa", False),
        ("regex", "(a+)+", "a" * 2000 + "b", False),
        ("json_schema", INTEGER, '{"a": 1}', True),
        ("json_schema", INTEGER, '{"a": 1', False),
        ("json_schema", INTEGER, '{"a": "1"}', False),
        ("json_schema", INTEGER, '{"a": 1, "b": 2}', False),
        ("json_schema", INTEGER, "", False),
        ("json_schema", '{"type":"string","pattern":"^(a+)+$"}', '"' + "a" * 40 + 'b"', False),
        ("json_schema", '{"type":"string"}', '"<|im_start|> \u5317\u4eac \U0001f600"', True),
    ],
)
def test_a_finished_answer_is_judged_by_grammar_and_schema(
    checker: GrammarChecker, kind: str, text: str, answer: str, holds: bool
) -> None:
    assert checker.holds(kind, text, answer) is holds


def test_an_answer_nobody_can_judge_in_time_is_not_called_good() -> None:
    checker = GrammarChecker(TOKENIZER, [END], judge_s=0.3)
    checker.start()
    assert checker.pid is not None
    try:
        os.kill(checker.pid, signal.SIGSTOP)
        with pytest.raises(GrammarError) as caught:
            checker.holds("regex", "a", "a")
        assert caught.value.reason is GrammarReason.TIME
    finally:
        checker.close()


def test_a_gevent_process_goes_on_while_a_grammar_explodes() -> None:
    script = f"""
from gevent import monkey; monkey.patch_all()
import gevent, time
from container.text.grammar_check import GrammarChecker
from container.text.grammar_errors import GrammarError
from tests.text import build
checker = GrammarChecker(build.byte_level().to_str().encode(), [])
checker.start()
ticks = []
def tick():
    while True:
        ticks.append(time.monotonic()); gevent.sleep(0.02)
ticker = gevent.spawn(tick)
def check(text):
    try: checker.check("regex", text)
    except GrammarError as error: return "refused"
    return "fine"
jobs = [gevent.spawn(check, text) for text in ("{NEST}", "a", "b", "c", "d", "e", "f")]
gevent.joinall(jobs, timeout=20)
ticker.kill()
checker.close()
print([job.value for job in jobs], max(b - a for a, b in zip(ticks, ticks[1:])) < 0.5, len(ticks) > 5)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr == ""
    assert result.stdout.strip() == f"{['refused'] + ['fine'] * 6} True True"


def test_a_process_forked_from_ours_starts_its_own_child(checker: GrammarChecker) -> None:
    inherited = checker.pid
    pid = os.fork()
    if pid == 0:
        fine = reason(checker, "regex", "forked") is None and checker.pid != inherited
        checker.close()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert checker.pid == inherited
    assert reason(checker, "regex", "ours") is None
