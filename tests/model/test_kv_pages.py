"""Pages keep what was written, are shared without a copy, and are wiped when the last reference goes."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import numpy.typing as npt
import pytest

from container.kernels.attention import KVType
from container.model.kv_limits import KVBudgetExceeded, KVLimits, LayerShape
from container.model.kv_page_memory import PageMemory
from container.model.kv_pages import PagedKV

LAYERS = [LayerShape(2, 8, 8), LayerShape(1, 16, 16, window=20)]
BLOCK = 16
BLOCKS = 40


def cache(resident_tokens: int | None = None, kv_type: KVType = KVType.FLOAT32) -> PagedKV:
    return PagedKV(LAYERS, kv_type, KVLimits(4, 1000, BLOCK, BLOCKS, resident_tokens))


def page_at(kv: PagedKV, address: int) -> npt.NDArray[np.uint8]:
    size = kv.layout.page_bytes
    return np.frombuffer((ctypes.c_uint8 * size).from_address(int(address)), np.uint8)


def write(kv: PagedKV, slot: int, tokens: int, value: int) -> list[int]:
    """Let the slot hold `tokens` positions, each page filled with `value`; return the addresses."""
    addresses = [int(address) for address in kv.place(slot, tokens)]
    for address in addresses:
        page_at(kv, address)[:] = value
    kv.check()
    return addresses


def test_a_slot_has_one_aligned_page_per_block() -> None:
    kv = cache()
    assert kv.place(0, 33).dtype == np.uintp
    assert len(kv.place(0, 33)) == 3
    assert all(address % 64 == 0 for address in kv.place(0, 33).tolist())
    assert kv.layout.page_bytes == 4 * BLOCK * 2 * (2 * 8 + 16)
    assert (kv.written(0), kv.resident_tokens) == (33, 33)


def test_growth_moves_nothing() -> None:
    kv = cache()
    first = write(kv, 0, 40, 7)
    early = kv.place(0, 40)
    grown = kv.place(0, 900)  # past the first table of addresses
    assert grown[:3].tolist() == first == early.tolist()
    assert all((page_at(kv, address) == 7).all() for address in first)


def test_new_pages_are_zero_even_where_another_sequence_was() -> None:
    kv = cache()
    used = write(kv, 0, 64, 9)
    kv.release(0)
    again = kv.place(1, 64).tolist()
    assert set(again) & set(used)
    assert all(not page_at(kv, address).any() for address in again)


def test_a_released_page_is_wiped_at_once() -> None:
    kv = cache()
    used = write(kv, 0, 64, 9)
    kv.release(0)
    assert all(not page_at(kv, address).any() for address in used)
    assert kv.resident_tokens == 0
    kv.check()


def test_saving_and_restoring_copies_nothing() -> None:
    kv = cache()
    used = write(kv, 0, 48, 5)
    for index, block in ((0, 11), (1, 3), (2, 40)):
        kv.save(0, index, block)
    held = kv._memory.held_pages
    kv.restore(1, [11, 3, 40])
    assert kv.place(1, 48).tolist() == used
    assert kv._memory.held_pages == held
    assert kv.resident_tokens == 48, "pages read by both count once"
    kv.release(0)
    kv.check()
    assert all((page_at(kv, address) == 5).all() for address in used)
    assert kv.written(1) == 48


def test_a_published_page_outlives_its_sequences_and_goes_with_its_name() -> None:
    kv = cache()
    used = write(kv, 0, 32, 5)
    kv.save(0, 0, 1)
    kv.release(0)
    assert (page_at(kv, used[0]) == 5).all() and not page_at(kv, used[1]).any()
    assert (kv.resident_tokens, kv.stored_blocks) == (0, 1)
    kv.forget(1)
    kv.forget(1)
    assert not page_at(kv, used[0]).any() and kv.stored_blocks == 0
    with pytest.raises(KeyError):
        kv.restore(1, [1])
    kv.check()


def test_a_forgotten_page_stays_while_it_is_read() -> None:
    kv = cache()
    used = write(kv, 0, 16, 5)
    kv.save(0, 0, 1)
    kv.forget(1)
    assert (page_at(kv, used[0]) == 5).all()
    kv.release(0)
    assert not page_at(kv, used[0]).any()


def test_a_block_saved_again_holds_the_newer_page_and_wipes_the_older() -> None:
    kv = cache()
    old, new = write(kv, 0, 16, 5), write(kv, 1, 16, 8)
    kv.save(0, 0, 1)
    kv.release(0)
    kv.save(1, 0, 1)
    assert not page_at(kv, old[0]).any()
    kv.save(1, 0, 1)  # again the same: nothing is lost
    kv.restore(2, [1])
    assert kv.place(2, 16).tolist() == new and (page_at(kv, new[0]) == 8).all()
    assert kv.stored_blocks == 1
    kv.check()


def test_a_restored_sequence_goes_on_in_its_own_page() -> None:
    kv = cache()
    used = write(kv, 0, 20, 5)
    kv.save(0, 0, 1)
    kv.restore(1, [1])
    longer = kv.place(1, 17).tolist()
    assert longer[0] == used[0] and longer[1] != used[1]
    assert kv.resident_tokens == 21
    kv.check()


def test_taken_back_positions_leave_nothing_behind_beyond_their_page() -> None:
    kv = cache()
    used = write(kv, 0, 70, 5)
    kv.truncate(0, 33)
    kv.check()
    assert (kv.written(0), kv.resident_tokens) == (33, 33)
    assert all(not page_at(kv, address).any() for address in used[3:])
    assert (page_at(kv, used[2]) == 5).all()
    assert kv.place(0, 34).tolist() == used[:3]
    kv.truncate(0, 32)
    assert not page_at(kv, used[2]).any()
    kv.truncate(0, 0)
    kv.check()
    assert kv._memory.held_pages == 0 and len(kv.place(0, 0)) == 0


def test_a_published_page_is_never_cut() -> None:
    kv = cache()
    write(kv, 0, 40, 5)
    kv.save(0, 1, 7)
    kv.truncate(0, 32)
    with pytest.raises(AssertionError, match="published"):
        kv.truncate(0, 31)
    kv.restore(1, [7])
    with pytest.raises(AssertionError, match="published"):
        kv.truncate(1, 3)
    with pytest.raises(AssertionError, match="behind its end"):
        kv.truncate(1, 17)
    kv.check()


def test_a_page_that_another_slot_reads_is_never_cut() -> None:
    kv = cache()
    write(kv, 0, 16, 5)
    kv.save(0, 0, 7)
    kv.restore(1, [7])
    kv.forget(7)
    with pytest.raises(AssertionError, match="published"):
        kv.truncate(1, 3)


def test_a_shared_page_is_never_written() -> None:
    kv = cache()
    write(kv, 0, 5, 5)
    kv._held[0].pages[0].names += 1  # what no caller can bring about
    with pytest.raises(AssertionError, match="written"):
        kv.place(0, 6)


def test_a_longer_sequence_than_promised_is_an_error_of_ours() -> None:
    kv = cache()
    with pytest.raises(AssertionError, match="longer"):
        kv.place(0, 1009)
    long = PagedKV(LAYERS, KVType.INT8, KVLimits(2, 32, BLOCK, BLOCKS))
    for block in range(3):
        write(long, 0, 16, 1)
        long.save(0, 0, block)
        long.release(0)
    with pytest.raises(AssertionError, match="longer"):
        long.restore(0, [0, 1, 2])


def test_a_slot_is_restored_only_while_empty() -> None:
    kv = cache()
    write(kv, 0, 16, 5)
    kv.save(0, 0, 1)
    with pytest.raises(AssertionError, match="holds a sequence"):
        kv.restore(0, [1])
    with pytest.raises(AssertionError, match="two places"):
        kv.restore(1, [1, 1])


def test_what_cannot_be_published_is_refused() -> None:
    kv = cache()
    write(kv, 0, 31, 5)
    with pytest.raises(AssertionError, match="full"):
        kv.save(0, 1, 1)
    with pytest.raises(AssertionError, match="pool"):
        kv.save(0, 0, BLOCKS + 1)
    with pytest.raises(AssertionError, match="pool"):
        kv.save(0, 0, -1)
    kv.check()


def test_releasing_an_empty_slot_does_nothing() -> None:
    kv = cache()
    used = write(kv, 0, 48, 5)
    kv.release(3)
    assert kv.written(3) == 0 and (page_at(kv, used[0]) == 5).all()


def test_running_sequences_together_stay_within_the_budget() -> None:
    kv = cache(resident_tokens=200)
    kv.place(0, 150)
    with pytest.raises(KVBudgetExceeded):
        kv.place(1, 51)
    assert kv.written(1) == 0
    kv.place(1, 50)
    with pytest.raises(KVBudgetExceeded):
        kv.place(0, 151)
    kv.check()
    kv.release(0)
    kv.place(2, 150)
    kv.truncate(2, 100)
    kv.place(3, 50)
    kv.check()


def test_shared_pages_are_charged_once_and_unread_ones_anew() -> None:
    kv = cache(resident_tokens=64)
    write(kv, 0, 48, 5)
    for index in range(3):
        kv.save(0, index, index)
    kv.restore(1, [0, 1, 2])
    kv.place(1, 64)
    assert kv.resident_tokens == 64
    kv.release(0)
    assert kv.resident_tokens == 64
    kv.release(1)
    kv.place(2, 32)
    with pytest.raises(KVBudgetExceeded):
        kv.restore(3, [0, 1, 2])
    kv.check()
    assert kv.written(3) == 0


def test_layers_whose_keys_and_values_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="width"):
        PagedKV([LayerShape(1, 16, 8)], KVType.FLOAT32, KVLimits(1, 16, 16, 1))
    with pytest.raises(ValueError, match="page_tokens"):
        PagedKV(LAYERS, KVType.FLOAT32, KVLimits(1, 128, 128, 1))


def test_reset_wipes_sequences_and_published_pages() -> None:
    kv = cache()
    used = write(kv, 0, 40, 5)
    kv.save(0, 0, 1)
    kv.restore(1, [1])
    kv.reset()
    assert all(not page_at(kv, address).any() for address in used)
    assert (kv.stored_blocks, kv.resident_tokens, kv.written(0)) == (0, 0, 0)
    kv.check()
    kv.place(0, 1)
    kv.close()
    assert kv.slab_bytes == 0


def test_freed_memory_beyond_the_bound_goes_back_to_the_system() -> None:
    memory = PageMemory(5000, idle_bytes=3 * 8192)
    pages = [memory.take() for _ in range(9)]
    for address in pages:
        ctypes.memset(address, 7, 5000)
    assert memory.resident_bytes == 9 * 8192
    for address in pages:
        memory.give_back(address)
    assert memory.resident_bytes == 3 * 8192
    assert all(not any(ctypes.string_at(address, 5000)) for address in pages)
    again = [memory.take() for _ in range(9)]
    assert sorted(again) == sorted(pages), "addresses are used again"
    assert set(again[:3]) == set(pages[:3]), "what is resident goes first"


def test_memory_is_not_unmapped_under_a_page_that_is_held() -> None:
    memory = PageMemory(100)
    memory.take()
    with pytest.raises(AssertionError, match="held"):
        memory.close()


def test_a_page_is_given_back_once() -> None:
    memory = PageMemory(100)
    address = memory.take()
    memory.give_back(address)
    with pytest.raises(KeyError):
        memory.give_back(address)


@pytest.mark.parametrize("page_bytes", [1, 4096, 40 << 20])
def test_pages_of_any_size_do_not_overlap(page_bytes: int) -> None:
    memory = PageMemory(page_bytes)
    addresses = sorted(memory.take() for _ in range(3))
    assert all(b - a >= page_bytes for a, b in itertools.pairwise(addresses))
    for address in addresses:
        ctypes.memset(address + page_bytes - 1, 1, 1)  # the last byte is ours too
        memory.give_back(address)
    memory.close()
