"""KEYS.md: every test that it names exists, and every source and refusal group it must explain is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model_package.providers import Means, provider
from model_package.refusal import WORDS, KeyRefused, Refusal

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "model_package" / "KEYS.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    tests = [
        path
        for room in ("model_package", "infra", "model", "sagemaker_entry")
        for path in (ROOT / "tests" / room).glob("test_*.py")
    ]
    written = {
        name for path in tests for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 30
    assert not named - written


def test_every_row_that_claims_something_names_a_test() -> None:
    tables = re.findall(r"\| claim \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 15
    assert all("`test_" in row.split("|")[2] for row in rows)


@pytest.mark.parametrize("source", re.findall(r"^\| `([a-z]+):", PAGE, re.MULTILINE))
def test_every_source_of_the_page_is_a_known_one(source: str) -> None:
    refusal = None
    try:
        provider(f"{source}:file:/none", Means({}))
    except KeyRefused as refused:
        refusal = refused.refusal
    assert refusal is not Refusal.SOURCE_UNKNOWN


def test_the_page_and_the_hint_list_the_same_sources() -> None:
    hint = WORDS[Refusal.SOURCE_UNKNOWN][1]
    in_hint = {form.partition(":")[0] for form in re.findall(r"`([a-z]+:)", hint)}
    on_page = set(re.findall(r"^\| `([a-z]+):", PAGE, re.MULTILINE))
    assert on_page - in_hint == {"env", "attest"}  # not to be advised
    assert not in_hint - on_page
