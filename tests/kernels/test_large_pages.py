"""Large pages: whole slices around the weights are asked for, nothing changes, refusals cost nothing."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import numpy as np
import pytest

from container.kernels.large_pages import COLLAPSE, FEWEST_BYTES, HUGEPAGE, LARGE, LargePages, spans


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


class Kernel:
    """Notes what it is asked, and answers with `errors` by address."""

    def __init__(self, errors: dict[int, int] | None = None, otherwise: int = 0) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._errors = errors or {}
        self._otherwise = otherwise

    def __call__(self, address: int, size: int, advice: int) -> int:
        self.asked.append((address, size, advice))
        return self._errors.get(address, self._otherwise) if advice == COLLAPSE else 0


def moved(kernel: Kernel, blocks: list[tuple[int, int]], switch: Path) -> int:
    pages = LargePages(blocks, kernel, switch)
    pages.join()
    return pages.moved_bytes


def test_spans_are_whole_slices_around_the_blocks_and_joined_where_they_touch() -> None:
    blocks = [(5 * LARGE + 1, LARGE), (3, 10), (100, LARGE), (9 * LARGE, 0)]
    assert spans(blocks) == [(0, 2 * LARGE), (5 * LARGE, 7 * LARGE)]


def test_every_slice_is_asked_for_once(switch: Path) -> None:
    kernel = Kernel()
    size = FEWEST_BYTES // 2
    assert moved(kernel, [(0, size), (size, size)], switch) == FEWEST_BYTES
    assert kernel.asked == [(at, LARGE, COLLAPSE) for at in range(0, FEWEST_BYTES, LARGE)]


def test_little_memory_is_left_alone(switch: Path) -> None:
    kernel = Kernel()
    assert moved(kernel, [(0, FEWEST_BYTES - 1)], switch) == 0
    assert not kernel.asked


@pytest.mark.parametrize("text", ["always madvise [never]\n", None])
def test_an_administrator_who_forbids_it_is_obeyed(switch: Path, text: str | None) -> None:
    switch.unlink()
    if text is not None:
        switch.write_text(text)
    kernel = Kernel()
    assert moved(kernel, [(0, FEWEST_BYTES)], switch) == 0
    assert not kernel.asked


def test_a_slice_that_cannot_be_moved_is_left_and_the_rest_goes_on(switch: Path) -> None:
    kernel = Kernel({LARGE: errno.ENOMEM, 3 * LARGE: errno.EINVAL})
    assert moved(kernel, [(0, FEWEST_BYTES)], switch) == FEWEST_BYTES - 2 * LARGE
    assert all(advice == COLLAPSE for *_, advice in kernel.asked)


def test_a_kernel_that_cannot_do_it_at_once_is_asked_to_do_it_in_its_own_time(switch: Path) -> None:
    kernel = Kernel(otherwise=errno.EINVAL)
    assert moved(kernel, [(0, FEWEST_BYTES)], switch) == 0
    assert (0, FEWEST_BYTES, HUGEPAGE) in kernel.asked


def test_closing_stops_it_between_two_slices(switch: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Kernel):
        def __call__(self, address: int, size: int, advice: int) -> int:
            entered.set()
            assert go_on.wait(10)
            return super().__call__(address, size, advice)

    kernel = Slow()
    pages = LargePages([(0, FEWEST_BYTES)], kernel, switch)
    assert entered.wait(10)
    closing = threading.Thread(target=pages.close)
    closing.start()
    while not pages._closed.is_set():
        pass
    go_on.set()
    closing.join(10)
    assert not closing.is_alive() and len(kernel.asked) == 1


def test_what_lies_in_memory_stays_as_it_is_while_it_is_read() -> None:
    arrays = [np.full(2**20 + 64, number, np.uint8) for number in range(48)]
    pages = LargePages((each.ctypes.data, each.nbytes) for each in arrays)
    for _ in range(3):
        assert all(each.min() == each.max() == number for number, each in enumerate(arrays))
    pages.join()
    assert all(each.min() == each.max() == number for number, each in enumerate(arrays))
    pages.close()
