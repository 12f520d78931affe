"""Nothing out of bounds reaches the native attention through its wrapper."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from container.kernels.attention import (
    MAX_DIM,
    MAX_PAGE_TOKENS,
    ROW,
    AttentionRow,
    AttentionShape,
    KVType,
    PageLayout,
    attention,
    packed_rows,
)
from container.kernels.operators import Native, Row

SHAPE = AttentionShape(4, 2, 16, 0.25)
LAYOUT = PageLayout.of([(2, 16)], 16, KVType.FLOAT32)
PAGES = np.zeros(4, np.uintp)


def floats(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


@pytest.fixture
def native() -> Iterator[Native]:
    team = Native(1)
    yield team
    team.close()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("kv_heads", 3, "multiple of `kv_heads`"),
        ("kv_heads", 0, "multiple of `kv_heads`"),
        ("heads", 0, "multiple of `kv_heads`"),
        ("dim", 12, "`dim`"),
        ("dim", 0, "`dim`"),
        ("dim", MAX_DIM + 8, "`dim`"),
        ("window", 0, "`window`"),
    ],
)
def test_a_shape_the_operator_cannot_compute_is_refused(field: str, value: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(SHAPE, **{field: value})


@pytest.mark.parametrize("page_tokens", [0, MAX_PAGE_TOKENS + 1])
def test_a_page_the_operator_cannot_hold_is_refused(page_tokens: int) -> None:
    with pytest.raises(ValueError, match="page_tokens"):
        PageLayout.of([(2, 16)], page_tokens, KVType.FLOAT32)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (AttentionRow(0, 0, 0, PAGES), "has tokens"),
        (AttentionRow(0, 1, -1, PAGES), "has tokens"),
        (AttentionRow(-1, 2, 0, PAGES), "outside"),
        (AttentionRow(9, 2, 0, PAGES), "outside"),
        (AttentionRow(0, 1, 64, PAGES), "no page"),
        (AttentionRow(0, 5, 60, PAGES), "no page"),
        (AttentionRow(0, 1, 0, PAGES.astype(np.int32)), "pointer-sized"),  # type: ignore[arg-type]
        (AttentionRow(0, 1, 0, PAGES.reshape(2, 2)), "pointer-sized"),
        (AttentionRow(0, 1, 0, PAGES[::2]), "side by side"),
    ],
)
def test_a_row_out_of_bounds_is_an_error_of_ours(row: AttentionRow, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        packed_rows([row], 10, 16)


def test_rows_that_overlap_are_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="overlap"):
        packed_rows([AttentionRow(2, 3, 0, PAGES), AttentionRow(0, 3, 0, PAGES)], 10, 16)
    packed_rows([AttentionRow(3, 3, 0, PAGES), AttentionRow(0, 3, 0, PAGES)], 10, 16)


def test_rows_are_packed_as_the_library_reads_them() -> None:
    packed = packed_rows([AttentionRow(3, 2, 17, PAGES)], 10, 16)
    assert ctypes.sizeof(Row) == ROW.itemsize
    row = Row.from_buffer_copy(packed.tobytes())
    assert (row.first, row.count, row.start, row.pages) == (3, 2, 17, PAGES.ctypes.data)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("qkv", floats(3, 7, 16), "`qkv`"),
        ("out", floats(2, 4, 16), "`out`"),
        ("out", floats(3, 4, 8), "`out`"),
        ("qkv", floats(3, 8, 16).astype(np.float64), "`qkv`"),
        ("out", floats(3, 16, 4).transpose(0, 2, 1), "`out`"),
        ("scratch", np.zeros(8, np.int32), "float32"),
        ("scratch", floats(16)[::2], "float32"),
    ],
)
def test_arrays_the_library_cannot_read_are_an_error_of_ours(
    native: Native, name: str, value: Any, sentence: str
) -> None:
    arrays: dict[str, Any] = {"qkv": floats(3, 8, 16), "out": floats(3, 4, 16), "scratch": None}
    arrays[name] = value
    with pytest.raises(AssertionError, match=sentence):
        attention(native, SHAPE, LAYOUT, 0, [], arrays["qkv"], arrays["out"], arrays["scratch"])
