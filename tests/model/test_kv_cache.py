"""Slabs and the block store keep what was written, for as long as promised, and no longer."""

from __future__ import annotations

import random

import pytest
import torch

from container.model.kv_cache import KVCache, Place
from container.model.kv_limits import KVBudgetExceeded, KVLimits, LayerShape

LAYERS = [LayerShape(2, 8, 8), LayerShape(2, 8, 8), LayerShape(1, 12, 4)]
BLOCK = 16


def cache(resident_tokens: int | None = None) -> KVCache:
    limits = KVLimits(4, 1000, BLOCK, 40, resident_tokens)
    return KVCache(LAYERS, torch.float32, limits)


def write(place: Place, first: int, last: int, value: float) -> None:
    for tensor in (*place.shelf.keys, *place.shelf.values):
        steps = torch.arange(first, last, dtype=torch.float32)
        tensor[place.row, :, first:last] = (value + steps)[None, :, None]


def assert_holds(place: Place, first: int, last: int, value: float) -> None:
    for tensor in (*place.shelf.keys, *place.shelf.values):
        steps = torch.arange(first, last, dtype=torch.float32) + value
        assert torch.equal(
            tensor[place.row, :, first:last], steps[None, :, None].expand_as(tensor[0, :, first:last])
        )


def test_each_layer_has_its_own_shape() -> None:
    place = cache().place(0, 5)
    assert [tuple(t.shape[1:]) for t in place.shelf.keys] == [(2, 128, 8), (2, 128, 8), (1, 128, 12)]
    assert [tuple(t.shape[1:]) for t in place.shelf.values] == [(2, 128, 8), (2, 128, 8), (1, 128, 4)]


def test_growth_keeps_what_was_written() -> None:
    kv = cache()
    write(kv.place(0, 100), 0, 100, 7.0)
    write(kv.place(1, 100), 0, 100, 9.0)
    for tokens in (129, 300, 1000):
        place = kv.place(0, tokens)
        assert place.shelf.capacity >= tokens
        assert_holds(place, 0, 100, 7.0)
    assert_holds(kv.place(1, 100), 0, 100, 9.0)


def test_the_largest_slab_is_no_larger_than_the_longest_sequence() -> None:
    assert cache().place(0, 1000).shelf.capacity == 1008  # whole blocks


def test_a_longer_sequence_than_promised_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="longer"):
        cache().place(0, 1009)


def test_a_released_row_is_wiped() -> None:
    kv = cache()
    place = kv.place(0, 200)
    write(place, 0, 200, 3.0)
    kv.release(0)
    assert all(not stack.any() for stack in place.shelf.stacks)
    assert kv.resident_tokens == 0


def test_a_row_left_by_growth_is_wiped() -> None:
    kv = cache()
    small = kv.place(0, 100)
    write(small, 0, 100, 3.0)
    kv.place(0, 200)
    assert all(not stack.any() for stack in small.shelf.stacks)


def test_releasing_an_empty_slot_does_nothing() -> None:
    kv = cache()
    write(kv.place(0, 48), 0, 48, 5.0)
    kv.release(3)
    assert kv.place(0, 48).shelf.stacks[0].any(), "another slot lost what it held"


def test_saved_blocks_come_back_in_another_slot() -> None:
    kv = cache()
    write(kv.place(0, 48), 0, 48, 5.0)
    for index, block in ((0, 11), (1, 3), (2, 40)):
        kv.save(0, index, block)
    kv.release(0)
    kv.restore(2, [11, 3, 40])
    assert_holds(kv.place(2, 48), 0, 48, 5.0)


def test_a_block_saved_again_holds_the_newer_content() -> None:
    kv = cache()
    write(kv.place(0, 16), 0, 16, 5.0)
    write(kv.place(1, 16), 0, 16, 8.0)
    kv.save(0, 0, 1)
    kv.save(1, 0, 1)
    kv.restore(2, [1])
    assert_holds(kv.place(2, 16), 0, 16, 8.0)
    assert kv.stored_blocks == 1


def test_a_saved_block_is_a_copy() -> None:
    kv = cache()
    write(kv.place(0, 16), 0, 16, 5.0)
    kv.save(0, 0, 1)
    write(kv.place(0, 16), 0, 16, 6.0)
    kv.restore(1, [1])
    assert_holds(kv.place(1, 16), 0, 16, 5.0)


def test_a_block_never_saved_cannot_be_restored() -> None:
    with pytest.raises(KeyError):
        cache().restore(0, [4])


def test_a_half_full_block_cannot_be_saved() -> None:
    kv = cache()
    kv.place(0, 15)
    with pytest.raises(AssertionError, match="full"):
        kv.save(0, 0, 1)


def test_a_block_outside_the_pool_cannot_be_saved() -> None:
    kv = cache()
    kv.place(0, 16)
    with pytest.raises(AssertionError, match="pool"):
        kv.save(0, 0, 41)


def test_running_sequences_together_stay_within_the_budget() -> None:
    kv = cache(resident_tokens=200)
    kv.place(0, 150)
    with pytest.raises(KVBudgetExceeded):
        kv.place(1, 51)
    kv.place(1, 50)
    with pytest.raises(KVBudgetExceeded):
        kv.place(0, 151)
    kv.release(0)
    kv.place(2, 150)


def test_reset_wipes_slabs_and_blocks() -> None:
    kv = cache()
    place = kv.place(0, 32)
    write(place, 0, 32, 5.0)
    kv.save(0, 0, 1)
    parts = kv._store[1]
    kv.reset()
    assert all(not tensor.any() for tensor in (*place.shelf.stacks, *parts))
    assert (kv.stored_blocks, kv.resident_tokens) == (0, 0)
    kv.place(0, 1)
    kv.close()
    assert kv.slab_bytes == 0


def test_slabs_of_ended_sequences_are_given_back() -> None:
    kv = KVCache(LAYERS, torch.float32, KVLimits(16, 1000, BLOCK, 40))
    for slot in range(16):
        kv.place(slot, 1000)
    most = kv.slab_bytes
    for slot in range(16):
        kv.release(slot)
    assert kv.slab_bytes == most // 4  # one shelf of four rows stays


def test_a_long_sequence_leaves_no_slab_behind_as_it_grows() -> None:
    kv = KVCache(LAYERS, torch.float32, KVLimits(16, 16384, BLOCK, 40))
    kv.place(0, 16384)
    alone = kv.slab_bytes
    kv.release(0)
    assert kv.slab_bytes == 0
    for tokens in (4096, 8192, 16384):
        kv.place(0, tokens)
    assert kv.slab_bytes == alone


def test_random_use_never_mixes_sequences() -> None:
    rng = random.Random(4)
    kv = cache()
    lengths: dict[int, int] = {}
    values: dict[int, float] = {}
    for _ in range(300):
        slot = rng.randrange(4)
        if slot in lengths and (rng.random() < 0.2 or lengths[slot] > 800):
            kv.release(slot)
            del lengths[slot]
        else:
            first = lengths.get(slot, 0)
            values[slot] = values[slot] if first else rng.randrange(10_000) * 1.0
            lengths[slot] = first + rng.randint(1, 120)
            write(kv.place(slot, lengths[slot]), first, lengths[slot], values[slot])
        for other, tokens in lengths.items():
            assert_holds(kv.place(other, tokens), 0, tokens, values[other])
        assert kv.resident_tokens == sum(lengths.values())
        rows = [(id(kv.place(s, n).shelf), kv.place(s, n).row) for s, n in lengths.items()]
        assert len(set(rows)) == len(rows)
