"""The one buffer of a step: every number at its place, padding that points nowhere."""

from __future__ import annotations

import random

import numpy as np
import pytest

from container.model.device_step import (
    DECODE_SIZES,
    Fields,
    StepRow,
    StepSize,
    captured_sizes,
    fill,
    needed_size,
    smallest_fit,
)

PAGE = 4
SPARE = 9


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uintp)


def parts(buffer: np.ndarray, size: StepSize) -> dict[str, list[int]]:
    return {name: buffer[first:end].tolist() for name, (first, end) in Fields(size).borders().items()}


def test_every_number_is_where_the_device_looks() -> None:
    rows = [
        StepRow(2, 6, [31, 32, 33], pages(5, 8, 3), (1, 2)),
        StepRow(7, 4, [0], pages(6, 1), (0,), fed=True),
    ]
    size = StepSize(6, 3, 4)
    buffer = np.full(size.ints + 7, -99, np.int32)
    assert fill(buffer, size, rows, [(2, 1, 8), (7, 0, 6)], [3], PAGE, SPARE) == size.ints + 7
    assert parts(buffer, size) == {
        "ids": [31, 32, 33, 0, 0, 0],
        "feeds": [-1, -1, -1, 7, -1, -1],
        "positions": [6, 7, 8, 4, 0, 0],
        "places": [8 * 4 + 2, 8 * 4 + 3, 3 * 4, 1 * 4, -1, -1],
        "starts": [0, 3, 4, 4],
        "lengths": [9, 5, 0],
        "lines": [2, 7, SPARE],
        "wanted": [1, 2, 3, 0],
        "keeps": [SPARE, 2, 7, SPARE],
    }
    assert buffer[size.ints :].tolist() == [2, 7, 1, 0, 8, 6, 3]


def test_a_buffer_is_written_afresh_each_time() -> None:
    """What a larger step left behind would be keys written to pages of somebody else by now."""
    size = StepSize(4, 4, 4)
    buffer = np.zeros(size.ints, np.int32)
    many = [StepRow(line, 0, [5], pages(line + 1), (0,), fed=True) for line in range(4)]
    fill(buffer, size, many, [], [], PAGE, SPARE)
    fill(buffer, size, many[:1], [], [], PAGE, SPARE)
    found = parts(buffer, size)
    assert found["places"] == [4, -1, -1, -1] and found["feeds"] == [0, -1, -1, -1]
    assert found["lines"] == [0, SPARE, SPARE, SPARE] and found["lengths"] == [1, 0, 0, 0]


def test_a_step_larger_than_its_buffer_is_never_written() -> None:
    row = StepRow(0, 0, [1, 2], pages(1), (1,))
    with pytest.raises(AssertionError, match="larger"):
        fill(np.zeros(64, np.int32), StepSize(1, 1, 1), [row], [], [], PAGE, SPARE)
    with pytest.raises(AssertionError, match="larger"):
        fill(np.zeros(3, np.int32), StepSize(2, 1, 1), [row], [], [], PAGE, SPARE)


@pytest.mark.parametrize(("slots", "step_tokens"), [(1, 16), (4, 32), (32, 256), (256, 2048), (1024, 8192)])
def test_captured_sizes_go_from_large_to_small_and_hold_every_small_decode(
    slots: int, step_tokens: int
) -> None:
    sizes = captured_sizes(slots, step_tokens)
    assert [size.tokens for size in sizes] == sorted((size.tokens for size in sizes), reverse=True)
    assert len(set(sizes)) == len(sizes)
    for running in range(1, min(slots, DECODE_SIZES[-1]) + 1):
        fit = smallest_fit(sizes, StepSize(running, running, running))  # however small a mixed one is
        assert fit is not None and fit.decodes and fit.tokens < max(2 * running, running + 8)


def test_a_mixed_step_never_runs_as_a_decode() -> None:
    sizes = captured_sizes(64, 512)
    draw = random.Random(5)
    for _ in range(300):
        rows = [
            StepRow(0, 0, [1] * draw.randint(2, 9), pages(*range(3)), ()) for _ in range(draw.randint(1, 40))
        ]
        needed = needed_size(rows)
        fit = smallest_fit(sizes, needed)
        assert fit is None or (fit.fits(needed) and not fit.decodes)
        assert (fit is None) == (needed.tokens > 512 or needed.rows > 64)
