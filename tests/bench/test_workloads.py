"""What every engine is asked is exact and the same everywhere."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from statistics import fmean, median, pstdev

import pytest

from tests.bench import workloads
from tests.bench.workloads import FULL, QUICK, Text, conversations, requests

TEXT = Text(range(200_003))  # every place its own id, so that reuse would show


def lengths(workload: str) -> list[tuple[int, int]]:
    return [(len(r.prompt), r.output_tokens) for r in requests(workload, TEXT, 1)]


def test_the_first_workload_is_64_tokens_in_and_128_out() -> None:
    assert lengths("W1") == [(64, 128)]


def test_the_second_workload_is_1024_tokens_in_and_one_out() -> None:
    assert lengths("W2") == [(1024, 1)]


def test_the_third_workload_cycles_prompts_and_outputs_independently() -> None:
    expected = [((32, 64, 128, 256, 512)[i % 5], (16, 32, 64, 128, 256)[i // 5 % 5]) for i in range(32)]
    assert lengths("W3") == expected
    assert len(set(expected[:25])) == 25
    assert all(r.at_s == 0.0 for r in requests("W3", TEXT, 1))


@pytest.mark.parametrize(("workload", "apart_s"), [("W4", 0.0), ("W4s", 0.2)])
def test_the_fourth_workload_shares_512_tokens_and_no_more(workload: str, apart_s: float) -> None:
    asked = requests(workload, TEXT, 1)
    assert [(len(r.prompt), r.output_tokens) for r in asked] == [(528, 32)] * 16
    assert len({r.prompt[:512] for r in asked}) == 1
    assert len({r.prompt[512] for r in asked}) == 16
    assert [r.at_s for r in asked] == pytest.approx([apart_s * number for number in range(16)])


def test_every_engine_gets_the_same_ids_in_the_same_round() -> None:
    for workload in FULL:
        assert requests(workload, TEXT, 3) == requests(workload, TEXT, 3)


@pytest.mark.parametrize("makers", [FULL, QUICK])
def test_no_prompt_begins_like_one_of_another_request_workload_or_round(makers: dict[str, object]) -> None:
    heads: Counter[int] = Counter()
    for turn in range(4):
        for workload in makers:
            asked = requests(workload, TEXT, turn, quick=makers is QUICK)
            heads.update({r.prompt[0] for r in asked})  # W4 shares on purpose: one head a run
    assert heads.total() == len(heads)


def test_the_text_starts_again_at_its_end() -> None:
    text = Text([1, 2, 3])
    assert text.take(2, 5) == (3, 1, 2, 3, 1)
    with pytest.raises(ValueError, match="no tokens"):
        Text([])


def test_every_workload_fits_the_window_that_peers_are_given() -> None:
    longest = [len(r.prompt) + r.output_tokens for w in FULL for r in requests(w, TEXT, 1)]
    longest += [len(r.prompt) + r.output_tokens for r in conversations(TEXT, 500, 1.0, seed=3)]
    assert max(longest) <= workloads.WINDOW_TOKENS


def test_conversations_arrive_as_a_poisson_process_with_the_stated_medians() -> None:
    asked = conversations(TEXT, 4000, 2.0, seed=5)
    gaps = [b.at_s - a.at_s for a, b in pairwise(asked)]
    # a mean of 4000 exponential gaps is within 5 % of 0.5 s, its spread equals its mean
    assert fmean(gaps) == pytest.approx(0.5, rel=0.05)
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.08)
    assert median(len(r.prompt) for r in asked) == pytest.approx(160, rel=0.05)
    assert median(r.output_tokens for r in asked) == pytest.approx(180, rel=0.05)


def test_conversations_at_any_rate_are_the_same_ones() -> None:
    slow, at_once = conversations(TEXT, 20, 0.5, seed=9), conversations(TEXT, 20, math.inf, seed=9)
    assert [(r.prompt, r.output_tokens) for r in slow] == [(r.prompt, r.output_tokens) for r in at_once]
    assert {r.at_s for r in at_once} == {0.0}
