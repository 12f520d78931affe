"""The arithmetic of figures against closed forms and a reference."""

from __future__ import annotations

import math
import random

import numpy
import pytest

from tests.bench.figures import Inexact, Timed, figures, medians, open_loop, percentile, ratios
from tests.bench.workloads import Request


def steady(first_s: float, gap_s: float, tokens: int) -> Timed:
    return Timed(tuple((first_s + gap_s * number, 1) for number in range(tokens)))


def test_percentiles_equal_those_of_numpy() -> None:
    draw = random.Random(1)
    for count in (1, 2, 3, 10, 101):
        values = [draw.expovariate(1.0) for _ in range(count)]
        for share in (0.0, 0.5, 0.95, 0.99, 1.0):
            assert percentile(values, share) == pytest.approx(float(numpy.percentile(values, share * 100)))


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.01), ([1.0], -0.1)])
def test_a_percentile_of_nothing_or_beyond_all_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, share)


def test_decoding_is_rated_without_the_first_token() -> None:
    made = figures("W1", [Request((1,) * 64, 101)], [steady(0.5, 0.01, 101)])
    assert made == {"decode_tok_s": pytest.approx(100.0), "first_token_s": 0.5}


def test_tokens_that_came_with_the_first_are_not_part_of_the_rate() -> None:
    made = figures("W1", [Request((1,), 12)], [Timed(((1.0, 2), (2.0, 10)))])
    assert made["decode_tok_s"] == pytest.approx(10.0)
    all_at_once = figures("W1", [Request((1,), 12)], [Timed(((1.0, 12),))])
    assert math.isnan(all_at_once["decode_tok_s"])


def test_prefill_is_rated_by_the_prompt() -> None:
    made = figures("W2", [Request((1,) * 1024, 1)], [Timed(((2.0, 1),))])
    assert made["prefill_tok_s"] == pytest.approx(512.0)


def test_waiting_counts_from_a_requests_own_arrival() -> None:
    asked = [Request((1,), 4, 0.0), Request((1,), 4, 2.0)]
    made = figures("W4s", asked, [steady(1.0, 0.1, 4), steady(3.5, 0.1, 4)])
    assert made["makespan_s"] == pytest.approx(3.8)
    assert made["output_tok_s"] == pytest.approx(8 / 3.8)
    assert (made["first_token_p50_s"], made["first_token_p95_s"]) == pytest.approx((1.25, 1.475))


@pytest.mark.parametrize(
    "got",
    [[steady(1.0, 0.1, 3)], [steady(1.0, 0.1, 5)], [Timed((), "429")], [], [steady(0, 1, 4)] * 2],
    ids=["short", "long", "failed", "missing", "surplus"],
)
def test_other_than_the_tokens_asked_for_is_never_a_figure(got: list[Timed]) -> None:
    with pytest.raises(Inexact):
        figures("W3", [Request((1,), 4)], got)


def test_goodput_counts_prompt_answers_only() -> None:
    asked = [Request((1,), 10)] * 4
    late, slow, refused = steady(6.0, 0.1, 10), steady(1.0, 0.5, 10), Timed((), "429")
    made = open_loop(asked, [steady(1.0, 0.1, 10), late, slow, refused])
    end_s = late.events[-1][0]
    assert made["goodput_tok_s"] == pytest.approx(10 / end_s)
    assert made["output_tok_s"] == pytest.approx(30 / end_s)
    assert (made["requests"], made["refused"], made["failed"]) == (4, 1, 0)


def test_an_overload_without_answers_has_figures_too() -> None:
    made = open_loop([Request((1,), 10)], [Timed((), "503")])
    assert (made["refused"], made["failed"]) == (0, 1)
    assert math.isnan(made["first_token_p50_s"])


def test_a_median_over_rounds_is_taken_figure_by_figure() -> None:
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 5.0, "b": 1.0}, {"a": 2.0}]) == {"a": 2.0}
    assert medians([]) == {}


def test_ratios_are_made_within_rounds() -> None:
    assert ratios([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])
