"""The native attention equals the reference on any shape, and a sequence's result is its own business."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from container.kernels import attention_reference as reference
from container.kernels.attention import SCRATCH_FLOATS, AttentionShape, KVType, PageLayout, attention
from container.kernels.operators import Native
from tests.kernels.paged import (
    LAYER,
    STALE,
    aligned,
    assert_like_reference,
    inputs,
    layout_for,
    random_shape,
    run,
    sequence,
)

SHAPE = AttentionShape(9, 3, 64, 0.125)
# Sums of up to 128 products and 800 weights in float32 against float64: the error of a score of size s is
# about s / 2^22 and becomes a relative error of weights; values are of size 1 to 3. Measured: at most 2e-6
# for inputs of size 1 and 6e-5 for those of size 3, whose scores are nine times as large. A wrong key or a
# mask one position off changes results by more than 1e-3.
TOLERANCE = {1.0: 1e-5, 3.0: 3e-4}


@pytest.fixture(params=["plain", "avx2", "avx512", None])
def natives(request: pytest.FixtureRequest) -> Iterator[list[Native]]:
    """Teams of one, two and three threads."""
    teams = [Native(threads, request.param) for threads in (1, 2, 3)]
    yield teams
    for team in teams:
        team.close()


@pytest.fixture
def native() -> Iterator[Native]:
    team = Native(2)
    yield team
    team.close()


@pytest.mark.parametrize("kv_type", list(KVType))
@pytest.mark.parametrize("seed", range(12))
def test_random_rows_equal_the_reference(natives: list[Native], kv_type: KVType, seed: int) -> None:
    rng = random.Random(seed)
    native = rng.choice(natives)
    shape, scale = random_shape(rng), rng.choice([1.0, 3.0])
    layout = layout_for(shape, rng.choice([16, rng.randint(1, 32)]), kv_type)
    lengths = [
        (
            rng.choice([0, rng.randint(0, 90), rng.randint(200, 700)]),
            rng.choice([1, 1, 2, rng.randint(3, 70)]),
        )
        for _ in range(rng.randint(1, 4))
    ]
    sequences = [
        sequence(shape, layout, start, count, seed + i, scale) for i, (start, count) in enumerate(lengths)
    ]
    qkv = inputs(shape, sum(count for _, count in lengths), seed + 100, scale)
    scratch = torch.full((SCRATCH_FLOATS,), float("nan")) if rng.random() < 0.7 else None
    found = run(native, shape, layout, sequences, qkv, scratch)
    assert_like_reference(native, shape, layout, sequences, qkv, found, TOLERANCE[scale])


@pytest.mark.parametrize("kv_type", list(KVType))
@pytest.mark.parametrize("page_tokens", [16, 5])
def test_keys_and_values_are_stored_as_the_reference_stores_them(
    natives: list[Native], kv_type: KVType, page_tokens: int
) -> None:
    layout = layout_for(SHAPE, page_tokens, kv_type)
    for native, count in zip(natives, (1, 7, 40), strict=True):
        mine = [sequence(SHAPE, layout, 30, count, 1), sequence(SHAPE, layout, 0, 1, 2)]
        theirs = [sequence(SHAPE, layout, 30, count, 1), sequence(SHAPE, layout, 0, 1, 2)]
        qkv = inputs(SHAPE, count + 1, 3)
        qkv[0, 9:] = 0.0  # a vector without a magnitude
        run(native, SHAPE, layout, mine, qkv)
        for one, first in zip(theirs, (0, count), strict=True):
            keys = qkv[first : first + one.count, 9:12]
            values = qkv[first : first + one.count, 12:]
            reference.write(one.pages, layout, LAYER, SHAPE, one.start, keys, values)
        for left, right in zip(mine, theirs, strict=True):
            for page, other in zip(left.pages, right.pages, strict=True):
                assert np.array_equal(page, other), "other bytes than the reference's"


def test_int8_is_as_near_as_half_a_step_of_its_scale() -> None:
    vectors = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    whole, scales = reference.quantized(vectors)
    assert (whole.abs().amax(-1) == 127).all()
    assert ((whole * scales[:, None] - vectors).abs() <= scales[:, None] * 0.5001).all()


def test_the_result_is_the_same_bits_however_the_prompt_is_cut(natives: list[Native]) -> None:
    for kv_type in KVType:
        layout = layout_for(SHAPE, 16, kv_type)
        qkv = inputs(SHAPE, 600, 5)
        whole = run(natives[0], SHAPE, layout, [sequence(SHAPE, layout, 0, 600, 0)], qkv)[0]
        cut = sequence(SHAPE, layout, 0, 600, 0)
        parts, rng = [], random.Random(3)
        while cut.start < 600:
            cut.count = min(rng.choice([1, 1, 4, 90, 200]), 600 - cut.start)
            scratch = torch.empty(SCRATCH_FLOATS) if rng.random() < 0.5 else None
            native = rng.choice(natives)
            parts += run(native, SHAPE, layout, [cut], qkv[cut.start : cut.start + cut.count], scratch)
            cut.start += cut.count
        assert torch.equal(torch.cat(parts), whole)


def test_the_result_is_the_same_bits_whoever_runs_beside_and_however_many_threads(
    natives: list[Native],
) -> None:
    shape = AttentionShape(6, 2, 64, 0.125, window=300)
    layout = layout_for(shape, 16, KVType.BFLOAT16)
    lengths = [(1500, 1), (700, 3), (0, 50), (260, 100), (9, 1)]
    qkv = inputs(shape, 155, 7)
    alone, first = [], 0
    for number, (start, count) in enumerate(lengths):
        one = sequence(shape, layout, start, count, number)
        alone += run(natives[0], shape, layout, [one], qkv[first : first + count])
        first += count
    for native in natives:
        for scratch in (None, torch.full((SCRATCH_FLOATS,), float("nan")), torch.empty(7)):
            together = [sequence(shape, layout, *length, number) for number, length in enumerate(lengths)]
            for mine, theirs in zip(run(native, shape, layout, together, qkv, scratch), alone, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kv_type", list(KVType))
def test_a_long_context_shared_by_threads_equals_the_reference(
    natives: list[Native], kv_type: KVType
) -> None:
    layout = layout_for(SHAPE, 16, kv_type)
    for native in natives:
        for start, count in ((1023, 1), (1022, 4), (255, 2)):  # across a segment's border too
            one = sequence(SHAPE, layout, start, count, 1)
            qkv = inputs(SHAPE, count, 2)
            found = run(native, SHAPE, layout, [one], qkv, torch.full((SCRATCH_FLOATS,), float("nan")))
            assert_like_reference(native, SHAPE, layout, [one], qkv, found, TOLERANCE[1.0])


def test_pages_that_several_sequences_share_are_read_by_all_and_left_alone(natives: list[Native]) -> None:
    layout = layout_for(SHAPE, 16, KVType.FLOAT32)
    common = sequence(SHAPE, layout, 64, 1, 1).pages[:4]
    before = [page.copy() for page in common]
    for native in natives:
        sequences = [sequence(SHAPE, layout, 64, count, 9) for count in (1, 20, 5)]
        for one in sequences:
            one.pages[:4] = common
        qkv = inputs(SHAPE, 26, 4)
        found = run(native, SHAPE, layout, sequences, qkv)
        assert_like_reference(native, SHAPE, layout, sequences, qkv, found, TOLERANCE[1.0])
        assert all(np.array_equal(page, old) for page, old in zip(common, before, strict=True))


@pytest.mark.parametrize("kv_type", list(KVType))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_sequence_never_reaches_its_neighbours(
    natives: list[Native], kv_type: KVType, bad: float
) -> None:
    layout = layout_for(SHAPE, 16, kv_type)
    lengths = [(40, 1), (300, 1), (3, 60), (0, 9)]
    qkv = inputs(SHAPE, 71, 5)
    for native in natives:
        for broken in range(4):
            first = sum(count for _, count in lengths[:broken])
            poisoned = qkv.clone()
            poisoned[first : first + lengths[broken][1]] = bad
            sequences = [sequence(SHAPE, layout, *length, number) for number, length in enumerate(lengths)]
            clean = run(native, SHAPE, layout, sequences, qkv)
            found = run(native, SHAPE, layout, sequences, poisoned, torch.empty(SCRATCH_FLOATS))
            for number, (mine, theirs) in enumerate(zip(found, clean, strict=True)):
                if number == broken:
                    assert mine.isnan().all(), "a broken sequence must not look whole"
                else:
                    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kv_type", list(KVType))
def test_a_nan_in_a_key_or_a_value_alone_is_not_turned_into_a_number(native: Native, kv_type: KVType) -> None:
    layout = layout_for(SHAPE, 16, kv_type)
    for part in (9, 12):
        qkv = inputs(SHAPE, 1, 5)
        qkv[0, part, 3] = float("nan")
        found = run(native, SHAPE, layout, [sequence(SHAPE, layout, 20, 1, 1)], qkv)[0]
        assert found[:, :3].isnan().any() and not found[:, 3:].isnan().any()


@pytest.mark.parametrize("kv_type", [KVType.FLOAT32, KVType.BFLOAT16])
def test_scores_of_any_size_are_softened_like_the_reference_does(
    natives: list[Native], kv_type: KVType
) -> None:
    layout = layout_for(SHAPE, 16, kv_type)
    for native in natives:
        one = sequence(SHAPE, layout, 100, 20, 1)
        qkv = inputs(SHAPE, 20, 2)
        for factor in (1e15, 0.0):  # the best key takes all; all alike: the mean
            qkv[:, :9] *= factor
            found = run(native, SHAPE, layout, [one], qkv)
            assert_like_reference(native, SHAPE, layout, [one], qkv, found, TOLERANCE[1.0])


@pytest.mark.parametrize("page_tokens", [16, 7])
@pytest.mark.parametrize("kv_type", [KVType.FLOAT32, KVType.BFLOAT16])
def test_positions_nobody_wrote_are_never_used(
    natives: list[Native], kv_type: KVType, page_tokens: int
) -> None:
    layout = layout_for(SHAPE, page_tokens, kv_type)
    for native in natives:
        for start, count in ((0, 1), (17, 1), (30, 3), (5, 50)):
            one = sequence(SHAPE, layout, start, count, 1)
            found = run(native, SHAPE, layout, [one], inputs(SHAPE, count, 2))
            assert np.isnan(one.pages[-1].view(np.float32)).any(), "the page should hold stale NaN"
            assert found[0].isfinite().all()


@pytest.mark.parametrize("page_tokens", [16, 7])
@pytest.mark.parametrize("kv_type", list(KVType))
def test_a_query_sees_its_window_and_nothing_beside_it(
    natives: list[Native], kv_type: KVType, page_tokens: int
) -> None:
    """A key and a value that nobody should see change not one bit, those of the window's ends do."""
    window, count, changed = 30, 100, 45
    shape = AttentionShape(6, 2, 40, 0.125, window)
    layout = layout_for(shape, page_tokens, kv_type)
    qkv = inputs(shape, count, 2)
    other = qkv.clone()
    other[changed, shape.heads :] += 3.0
    for native in natives:
        before, after = (
            run(native, shape, layout, [sequence(shape, layout, 0, count, 1)], each)[0]
            for each in (qkv, other)
        )
        same = (before == after).flatten(1).all(1)
        sees = [changed <= position < changed + window for position in range(count)]
        assert same.tolist() == [not each for each in sees]


@pytest.mark.parametrize("page_tokens", [16, 7])
@pytest.mark.parametrize("kv_type", [KVType.FLOAT32, KVType.BFLOAT16])
def test_what_lies_before_a_window_is_never_read_as_a_value(
    natives: list[Native], kv_type: KVType, page_tokens: int
) -> None:
    """Its pages may be somebody else's by now: a NaN there stays there."""
    shape = AttentionShape(6, 2, 40, 0.125, window=30)
    layout = layout_for(shape, page_tokens, kv_type)
    for native in natives:
        for count in (1, 20):
            one = sequence(shape, layout, 100, count, 1)
            gone = (100 + 1 - 30) // page_tokens
            one.pages[:gone] = [aligned(layout.page_bytes) for _ in range(gone)]
            assert run(native, shape, layout, [one], inputs(shape, count, 2))[0].isfinite().all()


def test_other_layers_and_other_tokens_are_left_alone(native: Native) -> None:
    layout = layout_for(SHAPE, 16, KVType.FLOAT32)
    one = sequence(SHAPE, layout, 0, 20, 1)
    one.pages = [aligned(layout.page_bytes) for _ in one.pages]
    out = torch.full((30, 9, 64), 7.0)
    attention(native, SHAPE, layout, LAYER, [one.row(4)], inputs(SHAPE, 30, 2).numpy(), out.numpy())
    assert (out[:4] == 7.0).all() and (out[24:] == 7.0).all() and not (out[4:24] == 7.0).any()
    for page in one.pages:
        assert (page[: layout.key_offsets[LAYER]] == STALE).all()
        assert (page[layout.key_offsets[LAYER + 1] :] == STALE).all()


def test_no_rows_are_no_work(native: Native) -> None:
    out = torch.full((3, SHAPE.heads, SHAPE.dim), 7.0)
    layout = layout_for(SHAPE, 16, KVType.FLOAT32)
    attention(native, SHAPE, layout, LAYER, [], inputs(SHAPE, 3, 1).numpy(), out.numpy())
    assert (out == 7.0).all()


def test_many_heads_over_one_kv_head_fit(natives: list[Native]) -> None:
    shape = AttentionShape(71, 1, 64, 0.125)  # more than a tile has rows
    layout = layout_for(shape, 16, KVType.BFLOAT16)
    for native in natives:
        sequences = [sequence(shape, layout, 300, 1, 1), sequence(shape, layout, 20, 3, 2)]
        qkv = inputs(shape, 4, 3)
        found = run(native, shape, layout, sequences, qkv, torch.empty(SCRATCH_FLOATS))
        assert_like_reference(native, shape, layout, sequences, qkv, found, TOLERANCE[1.0])


def test_the_widest_heads_and_the_longest_pages_fit(natives: list[Native]) -> None:
    shape = AttentionShape(4, 2, 256, 0.0625, window=70)
    for kv_type in KVType:
        layout = layout_for(shape, 64, kv_type)
        for native in natives:
            sequences = [sequence(shape, layout, 200, 1, 1), sequence(shape, layout, 20, 90, 2)]
            qkv = inputs(shape, 91, 3)
            found = run(native, shape, layout, sequences, qkv)
            assert_like_reference(native, shape, layout, sequences, qkv, found, TOLERANCE[1.0])


def test_layers_of_different_shapes_lie_one_behind_the_other() -> None:
    for kv_type, size in zip(KVType, (4, 2, 1), strict=True):
        layout = PageLayout.of([(2, 24), (3, 64)], 5, kv_type)
        scales = 8 * 4 if kv_type is KVType.INT8 else 0
        ends = []
        for number, (kv_heads, dim) in enumerate([(2, 24), (3, 64)]):
            ends += [
                layout.key_offsets[number] + kv_heads * (8 * dim * size + scales),
                layout.value_offsets[number] + kv_heads * (5 * dim * size + scales),
            ]
        begins = [
            layout.key_offsets[0],
            layout.value_offsets[0],
            layout.key_offsets[1],
            layout.value_offsets[1],
        ]
        assert begins[0] == 0 and all(at % 64 == 0 for at in (*begins, layout.page_bytes))
        assert all(0 <= b - e < 64 for e, b in zip(ends, [*begins[1:], layout.page_bytes], strict=True))
