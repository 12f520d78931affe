"""Each filter keeps what a plain definition and transformers' own logits processors keep."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from container.engine.request import SamplingParams
from container.model.filters import Row, candidates, mass_threshold, top_k_threshold

SIZES = (1, 2, 7, 100, 5000)


def row(seed: int, size: int, spread: float = 3.0) -> Row:
    values = np.random.default_rng(seed).normal(size=size).astype(np.float32) * np.float32(spread)
    return values - values.max()


def tied_row(seed: int, size: int) -> Row:
    values = np.random.default_rng(seed).integers(-4, 1, size=size).astype(np.float32)
    return values - values.max()


def kept(logits: Row, **options: float) -> set[int]:
    left = candidates(logits, SamplingParams(**options))  # type: ignore[arg-type]
    ids = range(len(logits)) if left.ids is None else left.ids.tolist()
    assert [float(x) for x in left.logits] == [float(logits[i]) for i in ids]
    return set(ids)


def kept_by(processor: object, logits: Row) -> set[int]:
    scores = processor(None, torch.from_numpy(logits)[None])[0]  # type: ignore[operator]
    return set(torch.isfinite(scores).nonzero().squeeze(1).tolist())


def probabilities(logits: Row) -> list[float]:
    weights = np.exp(logits.astype(np.float64))
    return (weights / weights.sum()).tolist()


def by_definition(keys: list[float], weights: list[float], share: float) -> set[int]:
    """Keys from the greatest down, whole ties at a time, until the weights reach `share`."""
    taken: set[int] = set()
    for key in sorted(set(keys), reverse=True):
        taken |= {i for i, other in enumerate(keys) if other == key}
        if sum(weights[i] for i in taken) >= share:
            break
    return taken


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 2, 50, 4999])
@pytest.mark.parametrize("make", [row, tied_row])
def test_top_k_keeps_what_transformers_keeps_ties_included(make: object, size: int, k: int) -> None:
    logits = make(size, size)  # type: ignore[operator]
    assert kept(logits, top_k=k) == kept_by(TopKLogitsWarper(k), logits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.001, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(size: int, p: float) -> None:
    for spread in (0.5, 3.0, 10.0):
        logits = row(size, size, spread)
        ours, theirs = kept(logits, top_p=p), kept_by(TopPLogitsWarper(p), logits)
        # transformers adds in float32 from the small end: one token at the border may fall either way
        assert len(ours ^ theirs) <= (1 if size == 5000 else 0)


@pytest.mark.parametrize("size", [7, 300])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.99])
def test_top_p_is_the_smallest_set_of_whole_ties_that_reaches_p(size: int, p: float) -> None:
    for seed in range(5):
        for logits in (row(seed, size), tied_row(seed, size)):
            expected = by_definition(logits.tolist(), probabilities(logits), p)
            assert kept(logits, top_p=p) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_typical_p_keeps_what_transformers_keeps(size: int, p: float) -> None:
    for spread in (0.5, 3.0):
        logits = row(size + 1, size, spread)
        ours, theirs = kept(logits, typical_p=p), kept_by(TypicalLogitsWarper(p), logits)
        assert len(ours ^ theirs) <= (1 if size == 5000 else 0)


def test_typical_p_keeps_ties_and_always_the_most_typical_token() -> None:
    logits = tied_row(3, 200)
    chances = probabilities(logits)
    entropy = -sum(p * np.log(p) for p in chances)
    distance = {value: abs(-np.log(chances[i]) - entropy) for i, value in enumerate(logits.tolist())}
    nearest = min(distance, key=distance.__getitem__)
    assert kept(logits, typical_p=1e-6) == set(np.flatnonzero(logits == nearest).tolist())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("make", [row, tied_row])
def test_min_p_keeps_what_transformers_keeps(make: object, size: int, p: float) -> None:
    logits = make(size, size)  # type: ignore[operator]
    assert kept(logits, min_p=p) == kept_by(MinPLogitsWarper(p), logits)


def test_filters_work_on_what_the_one_before_left_in_the_stated_order() -> None:
    logits = row(11, 400)
    scores = torch.from_numpy(logits)[None]
    for processor in (
        TopKLogitsWarper(60),
        TopPLogitsWarper(0.9),
        TypicalLogitsWarper(0.8),
        MinPLogitsWarper(0.05),
    ):
        scores = processor(None, scores)
    expected = set(torch.isfinite(scores[0]).nonzero().squeeze(1).tolist())
    together = kept(logits, top_k=60, top_p=0.9, typical_p=0.8, min_p=0.05)
    assert together == expected
    assert together != kept(logits, min_p=0.05)


def test_no_filter_keeps_every_token_without_listing_them() -> None:
    logits = row(1, 100)
    left = candidates(logits, SamplingParams())
    assert left.ids is None
    assert left.logits is logits


@pytest.mark.parametrize(
    "options", [{"top_k": 40}, {"top_p": 0.9}, {"typical_p": 0.9}, {"min_p": 0.1}, {"top_p": 1 - 1e-9}]
)
def test_excluded_tokens_stay_excluded_and_disturb_no_filter(options: dict[str, float]) -> None:
    logits = row(4, 300)
    allowed = logits[:100] - logits[:100].max()
    masked = np.concatenate([allowed, np.full(200, -np.inf, np.float32)])
    left = candidates(masked, SamplingParams(**options))  # type: ignore[arg-type]
    assert left.ids is not None
    drawable = set(left.ids[left.logits > -np.inf].tolist())
    assert drawable == kept(allowed, **options)


def test_a_single_token_left_over_survives_every_filter() -> None:
    alone = np.full(50, -np.inf, np.float32)
    alone[17] = 0.0
    assert kept(alone, top_k=1, top_p=0.1, typical_p=0.1, min_p=1.0) == {17}


def test_a_flat_row_has_one_big_tie() -> None:
    flat = np.zeros(1000, np.float32)
    for options in ({"top_k": 1}, {"top_p": 0.01}, {"typical_p": 0.01}, {"min_p": 1.0}):
        assert kept(flat, **options) == set(range(1000))  # type: ignore[arg-type]


@given(
    keys=st.lists(st.integers(-30, 0), min_size=1, max_size=40),
    share=st.floats(0.01, 1.0),
    factor=st.sampled_from([0.1, 1.0, 3.0]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_search_by_halves_gives_the_threshold_of_the_definition(
    keys: list[int], share: float, factor: float
) -> None:
    with mock.patch("container.model.filters.SORTED_KEYS", 2):  # so that short rows are cut, too
        check_threshold(keys, share, factor)


def check_threshold(keys: list[int], share: float, factor: float) -> None:
    values = np.array(keys, np.float32) * np.float32(factor)
    weights = np.exp2(np.array(keys, np.float32))  # powers of two: sums are exact in any order
    total = float(weights.astype(np.float64).sum())
    expected = by_definition(values.tolist(), weights.tolist(), share * total)
    threshold = mass_threshold(values, weights, share)
    assert set(np.flatnonzero(values >= np.float32(threshold)).tolist()) == expected


def test_the_full_share_keeps_everything_in_spite_of_rounding() -> None:
    values = row(8, 5000)
    weights = np.exp(values)
    assert mass_threshold(values, weights, 1.0 + 1e-12) == values.min()


def test_the_kth_value_counts_ties_one_by_one() -> None:
    keys = np.array([1, 3, 3, 2], np.float32)
    assert [top_k_threshold(keys, k) for k in (1, 2, 3, 4)] == [3, 3, 2, 1]


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0, 30.0])
def test_long_rows_have_the_threshold_of_a_full_sort(spread: float) -> None:
    values = row(21, 50_000, spread)
    weights = np.exp(values)
    descending = np.sort(values)[::-1]
    sums = np.cumsum(np.exp(descending), dtype=np.float64)
    for share in (0.05, 0.5, 0.9, 0.999, 0.999999):
        expected = descending[np.searchsorted(sums, share * sums[-1])]
        assert mass_threshold(values, weights, share) == expected
