"""The terms of a step's cost are found again in made-up times."""

from __future__ import annotations

import random

import pytest

from tests.bench import cost


def times(noise: float, square: float = 0.0) -> list[dict[str, float]]:
    draw = random.Random(2)
    made = []
    for batch, context in cost.grid(8192):
        pairs = batch * context
        exact_s = 3e-3 + 2e-4 * batch + 4e-8 * pairs + square * (pairs / 32768) ** 2
        step_s = exact_s * (1 + draw.uniform(-noise, noise))
        made.append({"batch": batch, "tokens": batch, "context": context, "pairs": pairs, "step_s": step_s})
    return made


def test_exact_times_give_their_terms_back() -> None:
    terms = cost.explain(times(0.0))["decode"]
    assert terms["fixed_ms"] == pytest.approx(3.0)
    assert terms["per_batch_ms"] == pytest.approx(0.2)
    assert terms["per_1000_pairs_ms"] == pytest.approx(0.04)
    assert terms["worst"] < 1e-9 and abs(terms["quadratic_share"]) < 1e-9


def test_noise_shows_in_the_residual_and_hardly_in_the_terms() -> None:
    terms = cost.explain(times(0.05))["decode"]
    assert 0.01 < terms["rms"] < 0.05 and terms["worst"] <= 0.07
    assert terms["per_batch_ms"] == pytest.approx(0.2, rel=0.1)


def test_a_cost_that_grows_faster_than_it_should_is_seen() -> None:
    # 5 ms of 10.1 ms at batch 4 and context 8192
    assert cost.explain(times(0.0, square=5e-3))["decode"]["quadratic_share"] == pytest.approx(0.49, abs=0.02)


def test_prefill_and_decode_are_explained_apart_and_too_few_points_not_at_all() -> None:
    prefill = [{"batch": 1, "tokens": 64 * n, "pairs": 64.0 * n * n, "step_s": 0.01 * n} for n in range(2, 9)]
    explained = cost.explain(prefill)
    assert explained["decode"] is None
    assert explained["prefill"]["per_tokens_ms"] == pytest.approx(10 / 64, rel=1e-6)


def test_the_grid_fits_the_window_and_the_pool() -> None:
    full = cost.grid(8192 + cost.STEP_ROOM)
    assert {b for b, _ in full} == {1, 2, 4, 8, 16, 32, 64, 128} and {c for _, c in full} >= {128, 8192}
    for window in (512, 2048, 8192):
        for batch, context in cost.grid(window):
            assert batch * context <= cost.POOL_TOKENS and context < window
