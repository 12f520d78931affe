"""The paged attention kernel against its plain reference, in poisoned memory, by Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from container.kernels.gpu import attention_reference as reference
from container.kernels.gpu.attention import PagedShape, Rows, Tuning, attend
from tests.kernels.gpu.attention_cases import (
    DTYPES,
    SENTINEL,
    Case,
    decode_of,
    error,
    make,
    of_few_variants,
    random_case,
    run,
)

SMALL = PagedShape(4, 2, 64, 64, 0.125)
MIXED = ((1, 1), (1, 33), (0, 5), (17, 17), (5, 40), (1, 16), (1, 17))


@pytest.mark.parametrize("seed", range(16))
def test_random_shapes_agree_with_the_reference(seed: int) -> None:
    assert error(random_case(seed)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
def test_prefill_chunks_and_decode_share_one_launch(dtype: torch.dtype, fp8: bool) -> None:
    assert error(Case(SMALL, MIXED, dtype=dtype, fp8=fp8)) <= 1


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 20])
def test_every_head_size_and_group(dim: int, group: int) -> None:
    shape = PagedShape(2 * group, 2, dim, dim, dim**-0.5)
    assert error(Case(shape, ((3, 21), (1, 16)))) <= 1


@pytest.mark.parametrize("page_tokens", [1, 8, 16, 64])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_lengths_around_the_end_of_a_page(page_tokens: int, off: int) -> None:
    length = 2 * page_tokens + off
    assert error(Case(SMALL, ((1, length), (min(length, 3), length)), page_tokens)) <= 1


@pytest.mark.parametrize("window", [1, 15, 16, 17])
@pytest.mark.parametrize("splits", [1, 4])
def test_windows_smaller_and_larger_than_a_page(window: int, splits: int) -> None:
    case = Case(replace(SMALL, window=window), ((1, 50), (9, 50), (20, 20)), tuning=Tuning(splits=splits))
    assert error(case) <= 1


@pytest.mark.parametrize("splits", [3, 16])
@pytest.mark.parametrize("sinks", [False, True])
def test_splits_add_up_to_the_whole(splits: int, sinks: bool) -> None:
    rows = ((1, 1), (1, 70), (1, 64), (2, 33))
    assert error(Case(SMALL, rows, sinks=sinks, tuning=Tuning(tile=16, splits=splits))) <= 1


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_scores_that_reach_their_cap(softcap: float) -> None:
    assert error(Case(replace(SMALL, softcap=softcap), MIXED, peak=300.0)) <= 1


def test_a_device_compiles_few_forms_for_many_rows() -> None:
    cases = [of_few_variants(seed, 16) for seed in range(200)]
    assert len({replace(case, rows=(), seed=0, peak=1.0) for case in cases}) <= 16
    assert len({case.rows for case in cases}) > 150
    assert all(count <= length or not count for case in cases for count, length in case.rows)
    assert error(of_few_variants(17, 16)) <= 1


def test_keys_and_values_of_unlike_width() -> None:
    assert error(Case(PagedShape(4, 4, 192, 128, 192**-0.5), MIXED)) <= 1


def test_a_sink_takes_weight_and_gives_no_value() -> None:
    case = Case(SMALL, ((1, 1),), sinks=True)
    made = make(case)
    assert made.extras.sinks is not None
    made.extras.sinks.fill_(40.0)
    run(case, made)
    assert float(made.out.abs().max()) < 1e-6


def test_padding_rows_and_tokens_of_no_row_are_left_alone() -> None:
    """As a captured launch has them: rows of no tokens at the end, tokens beyond the last row."""
    case = decode_of(random_case(3))
    made = make(case)
    rows, tokens = made.rows, made.query.shape[0]
    padded = Rows(
        torch.cat((rows.starts, rows.starts[-1:].expand(3))),
        torch.cat((rows.lengths, rows.lengths.new_zeros(3))),
        torch.cat((rows.slots, rows.slots.new_zeros(3))),
        rows.table,
    )
    query = torch.cat((made.query, torch.full_like(made.query[:1], float("nan")).expand(5, -1, -1)))
    out = torch.full((tokens + 5, *made.out.shape[1:]), SENTINEL, dtype=case.dtype)
    run(case, made)
    attend(
        case.shape, padded, query, made.keys, made.values, out, replace(case.tuning, splits=1), made.extras
    )
    assert bool((out[tokens:] == SENTINEL).all())
    torch.testing.assert_close(out[:tokens], made.out, atol=1e-2, rtol=1e-2)


def test_a_strided_query_is_read_where_it_lies() -> None:
    """Queries are the first part of a fused projection's output."""
    case = Case(SMALL, MIXED)
    made = make(case)
    run(case, made)
    wide = torch.full((made.query.shape[0], 8, 64), float("nan"))
    wide[:, :4] = made.query
    out = torch.empty_like(made.out)
    attend(case.shape, made.rows, wide[:, :4], made.keys, made.values, out, case.tuning)
    assert torch.equal(out, made.out)


def test_a_result_does_not_depend_on_the_other_rows() -> None:
    alone, beside = Case(SMALL, ((2, 37),)), Case(SMALL, ((2, 37), (30, 60), (1, 9)))
    first, second = make(alone), make(beside)
    second.query[:2] = first.query
    at = second.rows.table[second.rows.slots[0]].long()
    here = first.rows.table[first.rows.slots[0]].long()
    for page in range(3):
        second.keys[at[page]], second.values[at[page]] = first.keys[here[page]], first.values[here[page]]
    run(alone, first)
    run(beside, second)
    assert torch.equal(first.out, second.out[:2])


def test_the_reference_is_softmax_of_masked_scores() -> None:
    """The reference itself, against torch's own attention."""
    made = torch.Generator().manual_seed(1)
    query = torch.randn(5, 4, 16, generator=made, dtype=torch.float64)
    keys, values = (torch.randn(2, 9, 16, generator=made, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4).triu(2)
    want = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask, scale=0.3, enable_gqa=True
    )
    found = reference.attended(query, keys, values, 0, scale=0.3, window=3)
    torch.testing.assert_close(found, want[0].transpose(0, 1))


@pytest.mark.parametrize(
    "wrong",
    [{"heads": 3, "kv_heads": 2}, {"key_dim": 257}, {"value_dim": 0}, {"window": 0}, {"softcap": 0.0}],
)
def test_a_shape_that_the_kernel_does_not_know_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="`"):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("wrong", [{"block_rows": 8}, {"tile": 48}, {"splits": 0}])
def test_a_tuning_that_the_kernel_does_not_know_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`"):
        Tuning(**wrong)


def test_tensors_of_another_shape_never_reach_the_kernel() -> None:
    made = make(Case(SMALL, MIXED))
    with pytest.raises(AssertionError, match="shape"):
        attend(SMALL, made.rows, made.query, made.keys, made.values, made.out[:-1], Tuning())
    with pytest.raises(AssertionError, match="room"):
        attend(SMALL, made.rows, made.query, made.keys, made.values, made.out, Tuning(splits=2))
    with pytest.raises(AssertionError, match="fp8"):
        fp8 = make(Case(SMALL, MIXED, fp8=True))
        attend(SMALL, fp8.rows, fp8.query, fp8.keys, fp8.values, fp8.out, Tuning())
