"""200 schemas of real interfaces: each is refused with its reason, or gives finished answers, all valid.

`python -m tests.text.test_real_schemas` writes real_schemas.md anew; a test compares it byte for byte.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError, validators

from container.text.grammar_check import GrammarChecker
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.schema import schema_text
from tests.text import build
from tests.text.random_answers import RandomAnswers
from tests.text.real_schemas import Schema, from_shape, real_schemas

TABLE = Path(__file__).with_name("real_schemas.md")
ANSWERS = 5
LEAST_ACCEPTED = 180
# Of the machine, not of the schema: none may be among the refusals.
PASSING = {GrammarReason.TIME, GrammarReason.BUSY, GrammarReason.RESOURCES, GrammarReason.UNAVAILABLE}


@dataclass(frozen=True)
class Row:
    """One schema and what became of it."""

    source: str
    name: str
    refused: str
    finished: int
    invalid: int


def rows() -> Iterator[Row]:
    tokenizer = build.byte_level()
    eos = tokenizer.token_to_id("</s>")
    checker = GrammarChecker(tokenizer.to_str().encode(), [eos])
    answers = RandomAnswers(tokenizer.to_str(), eos, seed=1)
    try:
        for source, name, schema in real_schemas():
            try:
                text = schema_text(schema, closed=True)
                checker.check("json_schema", text)
            except GrammarError as error:
                assert error.reason not in PASSING
                named = f" (`{error.keyword}`)" if error.keyword else ""
                yield Row(source, name, f"{error.reason}{named}", 0, 0)
                continue
            yield Row(source, name, "", *judged(checker, answers, schema, text))
    finally:
        checker.close()


def judged(checker: GrammarChecker, answers: RandomAnswers, schema: Schema, text: str) -> tuple[int, int]:
    """Return how many answers were finished, up to the first without an end, and how many are not valid."""
    finished = invalid = 0
    for _ in range(ANSWERS):
        answer = answers.one(text)
        if answer is None:
            break
        finished += 1
        whole = answer.decode()
        valid = follows(schema, whole) and follows(json.loads(text), whole)
        if finished == 1:
            assert checker.holds("json_schema", text, whole) is valid, "the judge sees it differently"
        invalid += not valid
    return finished, invalid


def follows(schema: Schema, answer: str) -> bool:
    """Return True when `answer` is valid by the schema, patterns included where `re` can read them."""
    draft = validators.validator_for(schema, default=validators.Draft202012Validator)
    return validators.extend(draft, {"pattern": _pattern})(schema).is_valid(json.loads(answer))


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[Any]:
    try:
        compiled = re.compile(pattern)
    except re.error:
        return  # `\p{L}` and the like
    if isinstance(instance, str) and not compiled.search(instance):
        yield ValidationError("pattern")


def render(found: list[Row]) -> str:
    reasons = Counter(row.refused for row in found if row.refused)
    accepted = [row for row in found if not row.refused]
    whole = sum(row.finished == ANSWERS for row in accepted)
    invalid = sum(row.invalid for row in accepted)
    lines = [
        "# Real schemas",
        "",
        f"{len(found)} JSON schemas of real interfaces, strict: {len(accepted)} accepted,",
        f"{len(found) - len(accepted)} refused. Of {whole} of the accepted ones, {ANSWERS} answers of random",
        f"tokens under the mask were finished; {invalid} of all answers are not valid.",
        "Generated: run `python -m tests.text.test_real_schemas`.",
        "",
        "| refused because | schemas |",
        "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in sorted(reasons.items())),
        "",
        "| source | schema | outcome |",
        "|---|---|---|",
    ]
    for row in found:
        short = ", then one without an end" if row.finished < ANSWERS else ""
        kept = f"{row.finished - row.invalid} valid{short}"
        outcome = f"refused: {row.refused}" if row.refused else kept
        lines.append(f"| {row.source} | {row.name} | {outcome} |")
    return "\n".join([*lines, ""])


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows())


def test_every_accepted_schema_gives_five_finished_and_valid_answers(found: list[Row]) -> None:
    accepted = [row for row in found if not row.refused]
    assert [row for row in accepted if row.invalid] == []
    assert [row for row in accepted if row.finished != ANSWERS] == []


def test_most_real_schemas_are_accepted(found: list[Row]) -> None:
    assert len(found) == 200
    assert sum(not row.refused for row in found) >= LEAST_ACCEPTED


def test_the_table_of_real_schemas_is_current(found: list[Row]) -> None:
    assert TABLE.read_text(encoding="utf-8") == render(found)


def test_the_comparison_sees_an_invalid_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^b+$"}}, "required": ["a"]}
    assert follows(schema, '{"a": "bb"}')
    assert not follows(schema, '{"a": "c"}')
    assert not follows(schema, "{}")


def test_an_aws_shape_that_holds_itself_becomes_a_reference_to_the_root() -> None:
    shapes = {
        "Tree": {"type": "structure", "members": {"kids": {"shape": "Trees"}}, "required": ["kids"]},
        "Trees": {"type": "list", "member": {"shape": "Tree"}, "max": 3},
    }
    made = from_shape(shapes, "Tree")
    assert made["$ref"] == "#/$defs/Tree"
    assert made["$defs"]["Trees"] == {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 3}


if __name__ == "__main__":
    TABLE.write_text(render(list(rows())), encoding="utf-8")
