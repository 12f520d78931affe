"""Logprobs beside the draw and scores of given tokens, against log-softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from container.engine.request import SamplingParams
from container.model.sampler import score
from tests.model.test_sampler import WIDTH, draw, logits_of, sampler_with


def test_logprobs_are_of_the_raw_logits_whatever_the_sampling_does() -> None:
    params = SamplingParams(
        seed=3,
        temperature=0.3,
        top_k=5,
        repetition_penalty=1.5,
        logit_bias=((8, 6.0),),
        top_logprobs=4,
    )
    logits = logits_of(13)
    expected = logits[0].log_softmax(0)
    result = draw(sampler_with(params), logits)
    # float32 arithmetic in both; a unit in the last place at 10 nats is 1e-6
    assert result.logprob == pytest.approx(float(expected[result.token]), abs=3e-6)
    best = expected.topk(4)
    assert [token for token, _ in result.top] == best.indices.tolist()
    assert [value for _, value in result.top] == pytest.approx(best.values.tolist(), abs=3e-6)


def test_the_number_of_logprobs_is_what_was_asked() -> None:
    logits = logits_of(14)
    for count, expected in ((None, 0), (0, 0), (1, 1), (20, 20), (WIDTH + 5, WIDTH)):
        result = draw(sampler_with(SamplingParams(temperature=0.0, top_logprobs=count)), logits)
        assert (result.logprob is None) == (count is None)
        assert len(result.top) == expected


def test_the_chosen_token_has_the_same_logprob_in_the_top_list() -> None:
    result = draw(sampler_with(SamplingParams(temperature=0.0, top_logprobs=3)), logits_of(15))
    assert result.top[0] == (result.token, result.logprob)


def test_top_logprobs_put_the_lower_id_first_and_leave_out_impossible_tokens() -> None:
    logits = torch.full((1, WIDTH), -torch.inf)
    tied = list(range(20, 200, 4))  # long enough for an unstable sort to mix them up
    logits[0, tied] = 1.0
    result = draw(sampler_with(SamplingParams(temperature=0.0, top_logprobs=2)), logits)
    assert [token for token, _ in result.top] == tied[:2]
    result = draw(sampler_with(SamplingParams(temperature=0.0, top_logprobs=100)), logits)
    assert [token for token, _ in result.top] == tied
    assert result.logprob == pytest.approx(-np.log(len(tied)))


def test_ties_among_top_logprobs_are_in_id_order() -> None:
    values = torch.randint(0, 4, (1, 2000), generator=torch.Generator().manual_seed(1)).float()
    params = SamplingParams(temperature=0.0, top_logprobs=1500)
    result = draw(sampler_with(params, width=2000), values)
    expected = sorted(range(2000), key=lambda i: (-float(values[0, i]), i))[:1500]
    assert [token for token, _ in result.top] == expected


def test_scores_of_given_tokens_match_log_softmax() -> None:
    logits = logits_of(16, rows=40)
    tokens = [(i * 37) % WIDTH for i in range(40)]
    expected = logits.log_softmax(1)
    results = score(logits, tokens, 2)
    assert [r.token for r in results] == tokens
    for i, result in enumerate(results):
        assert result.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=3e-6)
        assert [token for token, _ in result.top] == expected[i].topk(2).indices.tolist()
    assert sum(len(r.top) for r in score(logits, tokens, 0)) == 0


def test_scores_of_a_broken_row_are_nan_and_the_others_stand() -> None:
    logits = logits_of(17, rows=3)
    expected = score(logits, [1, 2, 3], 1)
    logits[1, 9] = torch.nan
    first, broken, last = score(logits, [1, 2, 3], 1)
    assert (first, last) == (expected[0], expected[2])
    assert broken.logprob is not None
    assert np.isnan(broken.logprob)
    assert np.isnan(score(torch.full((1, 9), -torch.inf), [1], 3)[0].logprob or 0.0)
