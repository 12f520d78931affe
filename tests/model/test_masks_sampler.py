"""The sampler under a grammar: order of steps, held and ignored ends, seeds, logprobs, failing rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from container.engine.request import Grammar, GrammarKind, SamplingParams
from container.engine.step import SlotAssignment
from container.model.grammar import GrammarCache
from container.model.masks import Masks, Verdict
from container.model.sampler import Sampler
from tests.model.test_masks import (
    BROKEN,
    ENDLESS,
    EOS,
    LETTERS,
    OTHER_EOS,
    WIDTH,
    WORD,
    assigned,
    byte_tokenizer,
    flat,
    text,
)


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCache]:
    made = GrammarCache(byte_tokenizer(), [EOS, OTHER_EOS])
    yield made
    made.close()


@pytest.fixture
def masks(grammars: GrammarCache) -> Iterator[Masks]:
    made = Masks(grammars, WIDTH)
    yield made
    made.close()


def sampler_over(masks: Masks, *slots: SlotAssignment) -> Sampler:
    sampler = Sampler(WIDTH, masks)
    for slot in slots:
        sampler.assign(slot)
    return sampler


def spell(
    sampler: Sampler, logits: Tensor, steps: int = 8, hold: bool = False
) -> tuple[list[int], Verdict | None]:
    """Draw for slot 0 until its grammar is complete or has failed."""
    tokens: list[int] = []
    for position in range(steps):
        sampler.prepare([0])
        (drawn,) = sampler.sample(logits, [0], [position], [hold])
        if drawn is None:
            break
        tokens.append(drawn.token)
        if sampler.verdict(0) is not Verdict.OPEN:
            break
    return tokens, sampler.verdict(0)


def test_the_best_allowed_token_is_drawn(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(WORD))
    assert spell(sampler, flat(q=9.0, y=2.0, n=1.0)) == ([ord(c) for c in "yes"], Verdict.COMPLETE)


@pytest.mark.parametrize("hold", [False, True])
def test_ignored_end_of_sequence_waits_until_nothing_else_may_follow(masks: Masks, hold: bool) -> None:
    sampler = sampler_over(masks, assigned(LETTERS, stops=()))
    tokens, verdict = spell(sampler, flat(t257=9.0, x=1.0), hold=hold)
    assert (text(tokens), verdict) == ("xxxx", Verdict.COMPLETE)


def test_held_end_of_sequence_comes_once_it_is_no_longer_held(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(LETTERS, stops=(EOS, OTHER_EOS)))
    logits = flat(t257=9.0, x=1.0)
    sampler.prepare([0])
    first = sampler.sample(logits, [0], [2], [True])[0]
    sampler.prepare([0])
    second = sampler.sample(logits, [0], [3], [False])[0]
    assert first is not None and second is not None
    assert (first.token, second.token, sampler.verdict(0)) == (ord("x"), EOS, Verdict.COMPLETE)


def test_one_ignored_end_of_sequence_id_does_not_hold_back_the_other(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(ENDLESS, stops=(OTHER_EOS,)))
    tokens, verdict = spell(sampler, flat(t257=9.0, t258=5.0, a=1.0))
    assert (tokens, verdict) == ([ord("a"), OTHER_EOS], Verdict.COMPLETE)


def test_a_held_stop_id_is_drawn_where_the_grammar_leaves_nothing_else(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(WORD, stops=(ord("y"), ord("s"))))
    tokens, verdict = spell(sampler, flat(y=9.0, n=-9.0), hold=True)
    assert (text(tokens), verdict) == ("no", Verdict.COMPLETE)
    sampler = sampler_over(masks, assigned(Grammar(GrammarKind.REGEX, "yes"), stops=(ord("y"), ord("s"))))
    assert spell(sampler, flat(), hold=True) == ([ord(c) for c in "yes"], Verdict.COMPLETE)


def test_a_bias_moves_the_choice_among_what_is_allowed_only(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(WORD, logit_bias=((ord("n"), 5.0), (ord("q"), 100.0))))
    assert text(spell(sampler, flat(y=2.0))[0]) == "no"


def test_penalties_act_under_a_grammar_as_without(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(LETTERS, stops=(EOS, OTHER_EOS), presence_penalty=2.0))
    assert text(spell(sampler, flat(a=3.0, b=2.5, c=2.2, d=2.1))[0]) == "abcd"


def test_logprobs_come_from_the_raw_logits(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(WORD, top_logprobs=2))
    logits = flat(q=9.0, y=2.0)
    sampler.prepare([0])
    (drawn,) = sampler.sample(logits, [0], [5], [False])
    assert drawn is not None and drawn.token == ord("y")
    raw = torch.log_softmax(logits[0], dim=-1)
    assert drawn.logprob == pytest.approx(float(raw[ord("y")]), abs=1e-5)
    assert drawn.top[0] == (ord("q"), pytest.approx(float(raw[ord("q")]), abs=1e-5))


def test_draws_under_a_grammar_follow_the_seed_and_the_masked_distribution(masks: Masks) -> None:
    logits = flat(y=1.0, q=8.0)
    drawn = []
    for seed in range(400):
        sampler = sampler_over(masks, assigned(WORD, temperature=1.0, seed=seed))
        sampler.prepare([0])
        first = sampler.sample(logits, [0], [7], [False])[0]
        assert first is not None
        drawn.append(first.token)
    share = drawn.count(ord("y")) / len(drawn)
    assert abs(share - np.e / (1 + np.e)) < 0.08  # 3.6 standard deviations
    assert set(drawn) == {ord("y"), ord("n")}


def test_a_row_without_a_grammar_draws_beside_one_with_as_it_would_alone(masks: Masks) -> None:
    logits = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
    free = SamplingParams(temperature=0.9, seed=5)
    alone = Sampler(WIDTH)
    alone.assign(SlotAssignment(0, free, (), 1, 0, array("i", [1])))
    expected = alone.sample(logits[:1], [0], [9], [False])
    sampler = sampler_over(masks, SlotAssignment(0, free, (), 1, 0, array("i", [1])), assigned(WORD, slot=1))
    sampler.prepare([0, 1])
    drawn = sampler.sample(logits, [0, 1], [9, 9], [False, False])
    assert drawn[0] == expected[0] and drawn[1] is not None
    assert (sampler.verdict(0), sampler.verdict(1)) == (None, Verdict.OPEN)


def test_a_failed_grammar_fails_its_row_only(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(BROKEN, slot=0), assigned(WORD, slot=1))
    sampler.prepare([0, 1])
    drawn = sampler.sample(flat(rows=2), [0, 1], [2, 2], [False, False])
    assert drawn[0] is None and drawn[1] is not None
    assert (sampler.verdict(0), sampler.verdict(1)) == (Verdict.FAILED, Verdict.OPEN)


def test_broken_logits_under_a_grammar_are_not_the_grammar_s_fault(masks: Masks) -> None:
    sampler = sampler_over(masks, assigned(WORD))
    sampler.prepare([0])
    assert sampler.sample(torch.full((1, WIDTH), torch.nan), [0], [2], [False]) == [None]
    assert sampler.verdict(0) is Verdict.OPEN


def test_a_sampler_that_cannot_hold_to_grammars_fails_the_row_rather_than_ignore_one() -> None:
    sampler = Sampler(WIDTH)
    sampler.assign(assigned(WORD))
    assert not sampler.holds_grammars
    assert sampler.sample(flat(), [0], [2], [False]) == [None]
    assert sampler.verdict(0) is Verdict.FAILED
