"""The table of legal states, seeds of choices, and what outlives a slot."""

from __future__ import annotations

import itertools

import pytest

from container.engine.request import SampledToken, SamplingParams
from container.engine.sequence import LEGAL, IllegalMove, Sequence, State, choice_seed
from tests.engine.bench import request

ARROWS = {
    (State.NEW, State.HELD),
    (State.NEW, State.WAITING),
    (State.NEW, State.ASIDE),
    (State.ASIDE, State.HELD),
    (State.ASIDE, State.WAITING),
    (State.ASIDE, State.FINISHED),
    (State.HELD, State.WAITING),
    (State.HELD, State.FINISHED),
    (State.WAITING, State.HELD),
    (State.WAITING, State.RUNNING),
    (State.WAITING, State.FINISHED),
    (State.RUNNING, State.PREEMPTED),
    (State.RUNNING, State.FINISHED),
    (State.PREEMPTED, State.RUNNING),
    (State.PREEMPTED, State.FINISHED),
}


def make(**fields) -> Sequence:
    return Sequence.of(request(1, **fields), 0, 0, b"root")


@pytest.mark.parametrize(
    ("start", "end"), list(itertools.product(State, State)), ids=lambda state: state.value
)
def test_a_sequence_moves_along_the_table_and_no_other_way(start, end):
    sequence = make()
    sequence.state = start
    if (start, end) in ARROWS:
        sequence.move(end)
        assert sequence.state is end
    else:
        with pytest.raises(IllegalMove):
            sequence.move(end)
        assert sequence.state is start


def test_nothing_leaves_finished_and_everything_queued_can_reach_it():
    assert not LEGAL[State.FINISHED]
    assert all(State.FINISHED in LEGAL[state] for state in State if state not in (State.NEW, State.FINISHED))


def test_the_first_choice_keeps_the_seed_and_the_others_get_unrelated_ones():
    seeds = [choice_seed(5, choice) for choice in range(16)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert not set(seeds) & {choice_seed(6, choice) for choice in range(16)}


def test_the_seeds_of_choices_never_change_between_versions():
    assert choice_seed(5, 1) == 14587386327304629196
    assert choice_seed((1 << 64) - 1, 15) == 3305302510126918990


def test_preemption_keeps_tokens_seed_and_age_and_drops_the_place():
    sequence = make(prompt=6, seed=9)
    sequence.computed, sequence.table, sequence.slot, sequence.announced = 6, [3, 4], 2, 2
    sequence.history.append(11)
    sequence.forget_computed()
    assert (sequence.computed, sequence.table, sequence.slot, sequence.announced) == (0, [], None, 0)
    assert (sequence.total, sequence.generated, sequence.remaining) == (7, 1, 7)
    assert (sequence.sampling.seed, sequence.serial) == (9, 0)


def test_prompt_logprobs_are_wanted_until_complete_and_begin_anew_when_interrupted():
    sequence = make(prompt=3, sampling=SamplingParams(prompt_logprobs=0))
    sequence.prompt_logprobs.append(SampledToken(1))
    assert sequence.wants_prompt_logprobs
    sequence.forget_computed()
    assert sequence.prompt_logprobs == []
    sequence.prompt_logprobs += [SampledToken(1), SampledToken(2)]
    sequence.forget_computed()
    assert len(sequence.prompt_logprobs) == 2 and not sequence.wants_prompt_logprobs


def test_the_request_s_prompt_is_not_the_sequence_s_history():
    asked = request(1, 4)
    sequence = Sequence.of(asked, 0, 0, b"")
    sequence.history.append(1)
    assert len(asked.prompt) == 4
