"""The sampler: order of steps, reproducible draws, penalties, logprobs, failures of single rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from container.engine.request import SampledToken, SamplingParams
from container.engine.step import SlotAssignment
from container.model.sampler import Sampler, score

WIDTH = 211


def logits_of(seed: int, rows: int = 1, width: int = WIDTH, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def assignment(
    slot: int,
    params: SamplingParams,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    stops: tuple[int, ...] = (),
) -> SlotAssignment:
    return SlotAssignment(slot, params, stops, len(prompt), 0, array("i", [*prompt, *output]))


def sampler_with(params: SamplingParams, width: int = WIDTH, **options: object) -> Sampler:
    sampler = Sampler(width)
    sampler.assign(assignment(0, params, **options))  # type: ignore[arg-type]
    return sampler


def draw(sampler: Sampler, logits: Tensor, position: int = 10, hold: bool = False) -> SampledToken:
    (result,) = sampler.sample(logits, [0], [position], [hold])
    assert result is not None
    return result


GREEDY = SamplingParams(temperature=0.0)


# Greedy


def test_greedy_takes_the_argmax_of_each_row() -> None:
    logits = logits_of(0, rows=5)
    sampler = Sampler(WIDTH)
    for slot in range(5):
        sampler.assign(assignment(slot, GREEDY))
    results = sampler.sample(logits, range(5), [9] * 5, [False] * 5)
    assert [r.token for r in results if r] == logits.argmax(dim=1).tolist()


def test_greedy_breaks_ties_like_transformers_does() -> None:
    logits = torch.zeros(1, WIDTH)
    logits[0, [40, 7, 100]] = 1.0
    assert draw(sampler_with(GREEDY), logits).token == int(logits.argmax()) == 7


def test_raw_logits_are_left_as_they_were() -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, repetition_penalty=1.3, logit_bias=((5, 3.0),), top_logprobs=2
    )
    logits = logits_of(1)
    before = logits.clone()
    draw(sampler_with(params, stops=(7,)), logits, hold=True)
    assert torch.equal(logits, before)


# Draws


def test_draws_follow_the_softmax() -> None:
    logits = logits_of(2, width=12, spread=1.5)
    sampler = sampler_with(SamplingParams(seed=77), width=12)
    counts = Counter(draw(sampler, logits, position).token for position in range(6000))
    expected = (logits[0].double().softmax(0) * 6000).tolist()
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    logits = logits_of(3, spread=1.5)
    sampler = sampler_with(SamplingParams(seed=78, top_k=8, temperature=1.4))
    counts = Counter(draw(sampler, logits, position).token for position in range(6000))
    best = logits[0].topk(8)
    chances = (best.values.double() / 1.4).softmax(0).tolist()
    assert set(counts) == set(best.indices.tolist())
    chi_square = sum(
        (counts[int(i)] - 6000 * p) ** 2 / (6000 * p) for i, p in zip(best.indices, chances, strict=True)
    )
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


def test_draws_at_different_positions_are_independent() -> None:
    logits = torch.zeros(1, 4)
    sampler = sampler_with(SamplingParams(seed=5), width=4)
    tokens = [draw(sampler, logits, position).token for position in range(4001)]
    pairs = Counter(pairwise(tokens))
    chi_square = sum((pairs[a, b] - 250) ** 2 / 250 for a in range(4) for b in range(4))
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


def test_seeds_give_different_draws() -> None:
    logits = torch.zeros(1, WIDTH)
    tokens = {draw(sampler_with(SamplingParams(seed=seed)), logits).token for seed in range(100)}
    assert len(tokens) > 60  # 100 uniform draws of 211 values hit about 80 of them


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.8, top_p=0.9),
        SamplingParams(seed=3, top_k=20, repetition_penalty=1.2, frequency_penalty=0.5),
        SamplingParams(seed=2**64 - 1, typical_p=0.9, min_p=0.01, presence_penalty=1.0),
    ],
)
def test_a_seeded_sequence_is_the_same_alone_and_in_any_batch(params: SamplingParams) -> None:
    steps = [logits_of(100 + step) for step in range(12)]
    alone_sampler = sampler_with(params)
    alone = [draw(alone_sampler, steps[step], 3 + step).token for step in range(12)]
    for batch in (7, 64):
        sampler = Sampler(WIDTH)
        slot = batch // 2
        for other in range(batch):
            sampler.assign(assignment(other, SamplingParams(seed=other, temperature=1.1, top_k=other)))
        sampler.assign(assignment(slot, params))
        order = [(i * 5) % batch for i in range(batch)] if batch % 5 else list(range(batch))
        for step in range(12):
            logits = logits_of(step, rows=batch)
            logits[order.index(slot)] = steps[step][0]
            results = sampler.sample(logits, order, [3 + step] * batch, [False] * batch)
            mine = results[order.index(slot)]
            assert mine is not None
            assert mine.token == alone[step]


@pytest.mark.parametrize("k", [30, 180])
def test_a_filter_does_not_change_the_draw_among_what_it_keeps(k: int) -> None:
    logits = logits_of(6)
    kept, agreed = set(logits[0].topk(k).indices.tolist()), 0
    for position in range(300):
        free = draw(sampler_with(SamplingParams(seed=4)), logits, position).token
        few = draw(sampler_with(SamplingParams(seed=4, top_k=k)), logits, position).token
        assert few in kept
        if free in kept:
            assert few == free
            agreed += 1
    assert agreed > 100


def test_temperature_is_applied_before_top_p() -> None:
    logits = torch.full((1, WIDTH), -100.0)
    logits[0, :4] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    cold, hot = SamplingParams(temperature=0.2, top_p=0.9), SamplingParams(temperature=5.0, top_p=0.9)
    assert {draw(sampler_with(cold), logits, p).token for p in range(200)} == {0}
    assert {draw(sampler_with(hot), logits, p).token for p in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = logits_of(7, spread=10.0)
    for position in range(20):
        token = draw(sampler_with(SamplingParams(temperature=temperature)), logits, position).token
        assert token == int(logits.argmax())


# Penalties, bias, held stops


def reference_penalties(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """Repetition by transformers' processor, then OpenAI's published formula."""
    seen = torch.tensor([[*prompt, *output]])
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, logits.clone())
    for token, count in Counter(output).items():
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    return scores


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.7),
        SamplingParams(temperature=0.0, repetition_penalty=0.6),
        SamplingParams(temperature=0.0, frequency_penalty=1.1),
        SamplingParams(temperature=0.0, presence_penalty=-1.5),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=-0.4, presence_penalty=0.9),
    ],
)
def test_penalties_follow_their_definitions_step_by_step(params: SamplingParams) -> None:
    prompt = [5, 5, 9, 30]
    output: list[int] = []
    sampler = sampler_with(params, width=40, prompt=prompt)
    for step in range(60):
        logits = logits_of(step, width=40, spread=1.0)
        token = draw(sampler, logits, 4 + step).token
        assert token == int(reference_penalties(logits, params, prompt, output).argmax())
        output.append(token)


def test_penalties_rebuilt_after_preemption_equal_the_ones_kept() -> None:
    params = SamplingParams(seed=8, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.4)
    kept, output = sampler_with(params, width=40), []
    for step in range(50):
        rebuilt = sampler_with(params, width=40, output=output)
        logits = logits_of(step, width=40, spread=1.0)
        token = draw(kept, logits, 3 + step)
        assert draw(rebuilt, logits, 3 + step) == token
        output.append(token.token)


def test_frequency_and_presence_leave_the_prompt_alone() -> None:
    logits = torch.zeros(1, WIDTH)
    logits[0, 2] = 0.5
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    assert draw(sampler_with(params, prompt=[2, 2, 2]), logits).token == 2
    assert draw(sampler_with(params, prompt=[1], output=[2]), logits).token != 2


def test_bias_moves_the_choice_and_comes_after_penalties() -> None:
    logits = torch.zeros(1, WIDTH)
    logits[0, 2] = -1.0
    logits[0, 50] = 0.99  # between (-1 * 4) + bias, the right order, and (-1 + bias) / 4, the wrong one
    params = SamplingParams(temperature=0.0, repetition_penalty=4.0, logit_bias=((2, 4.98),))
    assert draw(sampler_with(params, prompt=[2]), logits).token == 50  # -4 + 4.98 = 0.98 < 0.99
    stronger = SamplingParams(temperature=0.0, repetition_penalty=4.0, logit_bias=((2, 5.0),))
    assert draw(sampler_with(stronger, prompt=[2]), logits).token == 2  # -4 + 5 = 1 > 0.99


def test_a_strong_bias_forces_or_bans_a_token() -> None:
    logits = logits_of(9)
    banned = SamplingParams(logit_bias=tuple((i, -100.0) for i in range(WIDTH) if i != 33))
    forced = SamplingParams(logit_bias=((34, 100.0),))
    for position in range(20):
        assert draw(sampler_with(banned), logits, position).token == 33
        assert draw(sampler_with(forced), logits, position).token == 34


def test_ids_outside_the_row_have_no_effect() -> None:
    logits = logits_of(10)
    plain = draw(sampler_with(SamplingParams(seed=6)), logits)
    params = SamplingParams(seed=6, logit_bias=((WIDTH, 9.0), (-1, 9.0), (10**9, 9.0)))
    assert draw(sampler_with(params, stops=(WIDTH, -1)), logits, hold=True) == plain
    penalised = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    sampler = sampler_with(penalised, prompt=[WIDTH, -1], output=[WIDTH + 5])
    assert draw(sampler, logits).token == int(logits.argmax())


def test_held_stop_ids_cannot_be_drawn_until_they_are_released() -> None:
    logits = torch.zeros(1, WIDTH)
    logits[0, [4, 6]] = 50.0
    for params in (GREEDY, SamplingParams(seed=1), SamplingParams(logit_bias=((4, 100.0),))):
        sampler = sampler_with(params, stops=(4, 6))
        for position in range(20):
            assert draw(sampler, logits, position, hold=True).token not in (4, 6)
        assert draw(sampler, logits, 20).token in (4, 6)


# Failures


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9, top_logprobs=3)])
def test_a_broken_row_fails_alone(value: float, params: SamplingParams) -> None:
    logits = logits_of(11, rows=3)
    sampler = Sampler(WIDTH)
    for slot in range(3):
        sampler.assign(assignment(slot, params))
    expected = sampler.sample(logits, range(3), [5] * 3, [False] * 3)
    logits[1, 150] = value
    results = sampler.sample(logits, range(3), [5] * 3, [False] * 3)
    assert results == [expected[0], None, expected[2]]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=2, typical_p=0.5), SamplingParams()])
def test_a_row_with_nothing_to_draw_fails(params: SamplingParams) -> None:
    nothing = torch.full((1, WIDTH), -torch.inf)
    assert sampler_with(params).sample(nothing, [0], [5], [False]) == [None]
    only_stop = nothing.clone()
    only_stop[0, 4] = 1.0
    sampler = sampler_with(params, stops=(4,))
    assert sampler.sample(only_stop, [0], [5], [True]) == [None]
    assert draw(sampler, only_stop).token == 4


def test_a_failed_row_counts_no_token() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler = sampler_with(params)
    broken = torch.full((1, WIDTH), torch.nan)
    assert sampler.sample(broken, [0], [5], [False]) == [None]
    logits = torch.zeros(1, WIDTH)
    logits[0, 0] = 1.0
    assert draw(sampler, logits).token == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_k=500),
        SamplingParams(seed=1, top_p=0.99),
        SamplingParams(seed=1, typical_p=0.9),
        SamplingParams(seed=1, min_p=0.001),
        SamplingParams(seed=1, repetition_penalty=1.5, frequency_penalty=1.0),
    ],
)
def test_masked_logits_are_never_drawn(params: SamplingParams) -> None:
    logits = logits_of(12)
    logits[0, ::2] = -torch.inf
    sampler = sampler_with(params, prompt=[0, 1, 2, 3])
    assert all(draw(sampler, logits, position).token % 2 for position in range(200))


# Slots


def test_a_released_slot_holds_nothing_for_its_next_sequence() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias=((3, 50.0),))
    sampler = sampler_with(params)
    logits = logits_of(18)
    assert draw(sampler, logits).token == 3
    sampler.release(0)
    sampler.assign(assignment(0, GREEDY))
    assert draw(sampler, logits).token == int(logits.argmax())


@pytest.mark.parametrize("forget", [lambda s: s.release(0), lambda s: s.reset()])
def test_a_forgotten_slot_cannot_be_sampled(forget: object) -> None:
    sampler = sampler_with(GREEDY)
    forget(sampler)  # type: ignore[operator]
    sampler.release(0)  # once more is harmless
    with pytest.raises(KeyError):
        draw(sampler, logits_of(19))


def test_rows_of_the_wrong_width_are_refused() -> None:
    with pytest.raises(AssertionError, match="one row of logits per slot"):
        draw(sampler_with(GREEDY), logits_of(20, width=WIDTH + 1))
    with pytest.raises(AssertionError, match="one row of logits per token"):
        score(logits_of(20), [1, 2], 0)


def test_state_shows_no_content_in_its_repr() -> None:
    params = SamplingParams(logit_bias=((123456, 1.0),), repetition_penalty=1.1)
    sampler = sampler_with(params, width=200_000, prompt=[123457], stops=(123458,))
    assert "12345" not in repr(sampler._slots)
