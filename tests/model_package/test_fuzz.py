"""The short form of the fuzzing: 20 seconds over every parser. `fuzz.py` has the long one."""

from __future__ import annotations

import json
import random
import resource

import pytest

from model_package import layout, manifest, toc
from model_package.outcome import Outcome, PackageError
from tests.model_package import fuzz

SECONDS = 20.0


def test_hostile_bytes_end_in_a_value_or_a_typed_error_soon(capsys: pytest.CaptureFixture[str]) -> None:
    """And most refusals that a parser has were reached: the inputs are not all refused at the door."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = fuzz.run(seed=20261123, seconds=SECONDS, report=lambda _: None)
    assert min(sum(outcomes.values()) for outcomes in seen.values()) >= 500
    assert {Outcome.OPENED, Outcome.MANIFEST_MALFORMED, Outcome.NAME_REFUSED} <= set(seen["manifest"])
    assert {Outcome.OPENED, Outcome.TOC_MALFORMED, Outcome.GEOMETRY_WRONG} & set(seen["toc"])
    assert Outcome.TOC_MALFORMED in seen["toc"]
    assert {Outcome.OPENED, Outcome.NOT_SEALED, Outcome.HEADER_OUT_OF_BOUNDS} <= set(seen["header"])
    assert {Outcome.SIGNATURE_MALFORMED, Outcome.SIGNATURE_WRONG} <= set(seen["signature"])
    assert {Outcome.OPENED, Outcome.MANIFEST_MALFORMED} <= set(seen["recipients"])
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 2 * fuzz.MEMORY_BYTES // 1024


@pytest.mark.parametrize("kind", fuzz.PARSERS)
def test_the_good_input_is_good(kind: str) -> None:
    raw = fuzz.good()[kind]
    if kind == "toc":
        assert len(toc.parse(raw, 4)) == 4
    else:
        assert fuzz.attack(kind, raw) is Outcome.OPENED


def test_a_parser_that_raises_anything_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: bytes) -> object:
        raise KeyError

    monkeypatch.setitem(fuzz.PARSERS, "header", fail)
    with pytest.raises(fuzz.Broken, match="seed 1, number 0: header: KeyError"):
        fuzz.run(1, 5.0, lambda _: None)


def test_a_parser_that_takes_too_long_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SLOWEST_S", -1.0)
    with pytest.raises(fuzz.Broken, match="s for 64 bytes"):
        fuzz.attack("header", fuzz.good()["header"])


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * manifest.MAX_MANIFEST_BYTES,
        b'{"a":' * (manifest.MAX_MANIFEST_BYTES // 5),
        b'{"files":[' + b"{}," * (manifest.MAX_MANIFEST_BYTES // 3 - 9),
        b'{"epoch":' + b"9" * (manifest.MAX_MANIFEST_BYTES - 20) + b"}",
        b'{"commitment":"' + b"\\u0061" * (manifest.MAX_MANIFEST_BYTES // 6 - 9) + b'"}',
    ],
    ids=["arrays", "objects", "entries", "digits", "escapes"],
)
def test_the_largest_manifest_costs_bounded_time_and_memory(raw: bytes) -> None:
    assert fuzz.attack("manifest", raw) is Outcome.MANIFEST_MALFORMED
    assert fuzz.peak_memory("manifest", raw) < 64 << 20


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * layout.MAX_TOC_BYTES,
        b"{" + b'"a":[],' * (layout.MAX_TOC_BYTES // 7 - 9) + b'"a":[]}',
        b'{"a":[' + b"1," * (layout.MAX_TOC_BYTES // 2 - 9) + b"1]}",
        b'{"a":"' + b"\\" * (layout.MAX_TOC_BYTES - 10) + b'"}',
        b'"' * layout.MAX_TOC_BYTES,
        b'{"__metadata__":{' + b",".join(b'"%x":""' % number for number in range(1_200_000)) + b"}}",
    ],
    ids=["arrays", "entries", "numbers", "backslashes", "quotes", "metadata"],
)
def test_the_largest_table_costs_bounded_time_and_memory(raw: bytes) -> None:
    """16 MiB that are refused take less than 4 times their size; 2.1 was measured."""
    assert len(raw) <= layout.MAX_TOC_BYTES
    assert fuzz.attack("toc", raw) is Outcome.TOC_MALFORMED
    assert fuzz.peak_memory("toc", raw) < 4 * layout.MAX_TOC_BYTES


def test_a_hundred_thousand_tensors_are_read_in_seconds() -> None:
    table = {
        f"t{number}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
        for number in range(layout.MAX_TENSORS)
    }
    raw = json.dumps(table, separators=(",", ":")).encode()
    assert len(toc.parse(raw, layout.MAX_TENSORS)) == layout.MAX_TENSORS
    with pytest.raises(PackageError):
        toc.parse(raw, layout.MAX_TENSORS - 1)


def test_the_same_seed_makes_the_same_inputs() -> None:
    made = [[fuzz.make(kind, random.Random(3)) for kind in fuzz.PARSERS] for _ in range(2)]
    assert made[0] == made[1]
