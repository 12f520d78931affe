"""Schemas and expressions made to explode: each is accepted or refused within 1 s and 100 MB.

Time is the client's whole wait. Memory is the growth of the fork that builds the grammar over the process
that holds the tokenizer, read while it runs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from container.text.grammar_check import GrammarChecker
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.regex_bounds import check_regex
from container.text.schema import schema_text
from tests.text import build

MOST_S = 1.0
MOST_BYTES = 100 * 1024 * 1024


def nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = wrap(schema)
    return schema


def wide(objects: int, properties: int) -> Any:
    inner = {f"p{number}": {"type": "string"} for number in range(properties)}
    return {"properties": {f"o{number}": {"properties": inner} for number in range(objects)}}


REFERENCES = {
    f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"items": {"$ref": f"#/$defs/d{n + 1}"}}]}
    for n in range(60)
}
SCHEMAS: dict[str, Any] = {
    "a million values": {"enum": [f"v{number}" for number in range(1_000_000)]},
    "twenty thousand values": {"enum": [f"v{number}" for number in range(20_000)]},
    "ten thousand properties": {"properties": {f"p{number}": {"type": "string"} for number in range(10_000)}},
    "forty objects of a hundred properties": wide(40, 100),
    "two to the thirtieth branches": nested(30, lambda s: {"anyOf": [s, s]}),
    "every branch at once": nested(12, lambda s: {"allOf": [s, {"anyOf": [s, {"type": "string"}]}]}),
    "sixty levels": nested(60, lambda s: {"type": "object", "properties": {"a": s}}),
    "ten thousand levels": nested(10_000, lambda s: {"items": s}),
    "at least 1e9 letters": {"type": "string", "minLength": 10**9},
    "at least 1e9 items": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "exactly a thousand cubed": nested(
        3, lambda s: {"type": "array", "minItems": 1000, "maxItems": 1000, "items": s}
    ),
    "references that double": {"$defs": {**REFERENCES, "d60": {"type": "string"}}, "$ref": "#/$defs/d0"},
    "a circle of references": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    "a reference to the machine's own services": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "a hundred bad patterns": {
        "properties": {
            f"p{n}": {"type": "string", "pattern": f"^(.*a{{1,{n + 1}}}){{20}}$"} for n in range(100)
        }
    },
    "a large step": {"type": "integer", "minimum": -(10**18), "maximum": 10**18, "multipleOf": 99_991},
    "a long constant": {"const": "x" * 300_000},
}
EXPRESSIONS = {
    "catastrophic to those who backtrack": "(a+)+b",
    "alternatives that overlap": "(a|b|ab)*c(x+x+)+y",
    "fifty times anything": "(.*){50}",
    "repeated repetitions": "(((a{100}){100}){100}){100}",
    "repeated behind a letter": "b(((a{40}){40}){40})",
    "a billion letters": "a{1000000000}",
    "a hundred thousand of anything": r"[\s\S]{0,100000}",
    "all of Unicode, often": r"(\p{L}|\p{N}|\w){0,30000}x",
    "far from the end": ".*a.{2000}.*b.{2000}",
    "words of words": r"(\w{1,200} ){1,300}",
    "thirty thousand parentheses": "(" * 30_000 + ")" * 30_000,
    "look-around": "(?=a)(?!b).*",
}  # fmt: skip
assert len(SCHEMAS) + len(EXPRESSIONS) >= 20


class Peak:
    """The most memory any fork of a process held, read every millisecond or so while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.resident = 0
        self.forks = 0

    def __enter__(self) -> Peak:
        self.base = resident(self._pid, "VmRSS:")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children")
        while not self._stopped.is_set():
            for child in children.read_text().split():
                self.forks += 1
                self.resident = max(self.resident, resident(int(child), "VmHWM:"))
            time.sleep(0.001)


def resident(pid: int, name: str) -> int:
    """Return a size of a process in bytes, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(build.byte_level().to_str().encode(), [])
    made.start()
    yield made
    made.close()


def outcome(call: Callable[[], None]) -> GrammarReason | None:
    try:
        call()
    except GrammarError as error:
        return error.reason
    return None


def measured(checker: GrammarChecker, call: Callable[[], None]) -> GrammarReason | None:
    """Return how `call` ended; fails when it took too long or too much."""
    assert checker.pid is not None
    with Peak(checker.pid) as peak:
        started_s = time.monotonic()
        ended = outcome(call)
        took_s = time.monotonic() - started_s
    assert took_s < MOST_S
    assert peak.resident - peak.base < MOST_BYTES
    return ended


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_made_to_explode_is_answered_within_1_s_and_100_mb(
    checker: GrammarChecker, name: str
) -> None:
    def whole() -> None:
        checker.check("json_schema", schema_text(SCHEMAS[name], closed=True))

    assert measured(checker, whole) is not GrammarReason.BUSY


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_made_to_explode_is_answered_within_1_s_and_100_mb(
    checker: GrammarChecker, name: str
) -> None:
    def whole() -> None:
        check_regex(EXPRESSIONS[name])
        checker.check("regex", EXPRESSIONS[name])

    assert measured(checker, whole) is not GrammarReason.BUSY


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_process_holds_its_bounds_even_without_the_count_before_it(
    checker: GrammarChecker, name: str
) -> None:
    assert measured(checker, lambda: checker.check("regex", EXPRESSIONS[name])) is not GrammarReason.BUSY


@pytest.mark.parametrize(
    "name", ["ten thousand properties", "twenty thousand values", "every branch at once"]
)
def test_the_process_holds_its_bounds_even_without_the_reading_before_it(
    checker: GrammarChecker, name: str
) -> None:

    text = json.dumps(SCHEMAS[name])
    assert measured(checker, lambda: checker.check("json_schema", text)) is not GrammarReason.BUSY


def test_the_measure_sees_a_fork_and_its_memory(checker: GrammarChecker) -> None:
    assert checker.pid is not None
    with Peak(checker.pid) as peak:
        outcome(lambda: checker.check("regex", EXPRESSIONS["repeated repetitions"] + "c"))
    assert peak.forks > 0
    assert peak.resident > peak.base > 0
