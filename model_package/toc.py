"""The table of contents: a safetensors header, read strictly. FORMAT.md 5.5.

Owns: what counts as a well-formed table. Must not know: chunks, keys, files.
Invariant: `parse` returns tensors that tile the data without hole or overlap, or raises PackageError with
TOC_MALFORMED; what it builds is bounded by the number of tensors it was told to expect.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NoReturn

from model_package.layout import MAX_TOC_BYTES, MIN_TOC_BYTES
from model_package.outcome import Outcome, PackageError

METADATA: Final = "__metadata__"
MAX_METADATA: Final = 1024
STRINGS_PER_TENSOR: Final = 5  # its name, three keys, its dtype
MAX_NAME_BYTES: Final = 512
MAX_DIMENSIONS: Final = 16
MAX_DIMENSION: Final = 2**40
MAX_ELEMENTS: Final = 2**48
MAX_DIGITS: Final = 20  # of an integer; 2**64 has 20
DTYPE_BITS: Final = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}

# Possessive: no backtracking, and an unterminated string ends the scan.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ODD_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f/]|\.\.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor; `begin` and `end` count bytes from the start of the data."""

    name: str = field(repr=False)
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def data_bytes(self) -> int:
        return self.end - self.begin


def parse(raw: bytes, tensors: int | None) -> tuple[Entry, ...]:
    """Return the entries of the table `raw` in segment order.

    `tensors` is how many there must be; None, while sealing a file of one's own, takes any number. Raises
    PackageError with TOC_MALFORMED.
    """
    if not MIN_TOC_BYTES <= len(raw) <= MAX_TOC_BYTES:
        refuse()
    if tensors is not None:
        _check_brackets(raw, tensors)
    table = _parse_json(raw)
    metadata = table.pop(METADATA, {})
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        refuse()
    if not all(isinstance(value, str) for value in metadata.values()):
        refuse()
    if tensors is not None and len(table) != tensors:
        refuse()
    entries = sorted(
        (_entry(name, value) for name, value in table.items()),
        key=lambda entry: (entry.begin, entry.end, entry.name.encode()),
    )
    _check_tiling(entries)
    return tuple(entries)


def refuse() -> NoReturn:
    raise PackageError(Outcome.TOC_MALFORMED)


def _check_brackets(raw: bytes, tensors: int) -> None:
    """Refuse more strings and containers than the tensors account for, before any is built."""
    most = STRINGS_PER_TENSOR * tensors + 2 * MAX_METADATA + 1
    outside, strings = _STRING.subn(b"", raw, count=most + 1)
    if (
        strings > most
        or outside.count(b"[") != 2 * tensors
        or outside.count(b"{") not in (tensors + 1, tensors + 2)
    ):
        refuse()


def _parse_json(raw: bytes) -> dict[str, Any]:
    table: Any = None
    try:
        text = raw.decode("utf-8").rstrip(" ")
        if text.startswith("{") and text.endswith("}"):
            table = json.loads(
                text,
                parse_int=_integer,
                parse_float=_number,
                parse_constant=_number,
                object_pairs_hook=_object,
            )
    except (ValueError, RecursionError):
        table = None  # raised below: the exception would hold the table
    if not isinstance(table, dict):
        refuse()
    return table


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        refuse()
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        refuse()
    return int(digits)


def _number(_digits: str) -> NoReturn:
    refuse()


def _entry(name: str, value: Any) -> Entry:
    _check_name(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse()
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or not _integers(shape) or not _integers(offsets) or len(offsets) != 2:
        refuse()
    if len(shape) > MAX_DIMENSIONS or any(size > MAX_DIMENSION for size in shape):
        refuse()
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        refuse()
    begin, end = offsets
    if begin > end or math.prod(shape) * bits != 8 * (end - begin):
        refuse()
    return Entry(name, dtype, tuple(shape), begin, end)


def _check_name(name: str) -> None:
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:  # a lone surrogate
        length = 0
    if not 1 <= length <= MAX_NAME_BYTES or _ODD_CHARACTER.search(name):
        refuse()


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(entries: list[Entry]) -> None:
    if entries and entries[0].begin != 0:
        refuse()
    for before, after in pairwise(entries):
        if after.begin != before.end:
            refuse()
