"""Guessing ahead: the same tokens in fewer steps, and never at anybody's cost."""

from __future__ import annotations

import dataclasses
from array import array

import pytest

from container.engine.outcome import BrokenResult, match
from container.engine.planning import Outline, Step
from container.engine.request import FinishReason, SampledToken, SamplingParams
from container.engine.scheduler import Scheduler
from container.engine.sequence import Sequence
from container.engine.speculation import MOST_RUNNING
from container.engine.step import ROW_HOLDS_STOPS, RowResult, StepPlan, StepResult
from tests.engine.bench import VOCABULARY, Bench, capacity, request
from tests.engine.fake_grammars import grammar
from tests.engine.fake_runner import PERIOD, expected_tokens

REPEATS = SamplingParams(min_p=1.0)  # the fake model goes on repeating what it said PERIOD tokens before
WANDERS = SamplingParams()  # no token follows from another
GUESSING = {"draft_tokens": 4}


def drafts_of(plan: StepPlan) -> int:
    return sum(plan.drafts)


def run(bench: Bench, *requests: object) -> Bench:
    bench.submit(*requests)  # type: ignore[arg-type]
    bench.run()
    bench.check_complete()
    return bench


def test_a_sequence_that_repeats_itself_takes_fewer_steps_for_the_same_tokens():
    plain = run(Bench(), request(1, 10, 60, sampling=REPEATS))
    guessing = run(Bench(**GUESSING), request(1, 10, 60, sampling=REPEATS))
    assert guessing.choices[next(iter(guessing.choices))].tokens == plain.choice(1).tokens
    before, after = plain.engine.stats(), guessing.engine.stats()
    assert (before.steps, before.draft_tokens, before.accepted_tokens) == (60, 0, 0)
    assert after.steps < 20
    assert after.generated_tokens == 60
    assert (
        after.steps + after.accepted_tokens == 60
    )  # each step samples one token beyond the drafts it accepts


def test_each_step_gives_one_delta_with_all_its_tokens():
    bench = Bench(**GUESSING)
    bench.submit(request(1, 10, 60, sampling=REPEATS))
    sizes = []
    while bench.engine.has_work:
        sizes += [len(delta.tokens) for delta in bench.step()]
    assert max(sizes) == 5 and sizes[0] == 1 and sum(sizes) == 60


def test_a_sequence_that_wanders_is_hardly_ever_guessed_at():
    """The fake model draws from 997 tokens; now and then two of them happen to follow each other again."""
    bench = run(Bench(**GUESSING, sequence_tokens=1024, blocks=256), request(1, 100, 900, sampling=WANDERS))
    assert bench.engine.stats().draft_tokens < 9


def test_guesses_that_fail_stop_and_are_tried_again_ever_less_often():
    """A prompt that repeats invites guesses; the model wanders, so that none holds."""
    bench = Bench(**GUESSING, sequence_tokens=1024, blocks=256)
    fickle = [(n * 7) % 31 for n in range(120)]
    bench.submit(request(1, fickle, 600, sampling=SamplingParams(seed=3)))
    # The model is made to draw from a few tokens only, so that n-grams recur and tell nothing.
    bench.runner.alter = shrink_vocabulary(4)
    guessed = []
    while bench.engine.has_work:
        bench.engine.step()
        assert bench.runner.problem is None
        guessed.append(drafts_of(bench.runner.plans[-1]) > 0)
    first, second, third = guessed[:150], guessed[150:300], guessed[300:450]
    assert sum(first) > sum(second) >= sum(third)
    assert sum(guessed) < len(guessed) // 8


def shrink_vocabulary(size: int):
    """The runner verifies against its own tokens, so what it accepted by its own account is cut off."""

    def alter(result: StepResult) -> StepResult:
        rows = []
        for row in result.rows:
            assert row.sampled is not None
            rows.append(RowResult(row.row, SampledToken(row.sampled.token % size)))
        return StepResult(result.number, rows)

    return alter


@pytest.mark.parametrize("max_tokens", range(1, 14))
def test_no_token_is_made_beyond_max_tokens(max_tokens):
    bench = run(Bench(**GUESSING), request(1, 10, max_tokens, sampling=REPEATS))
    assert bench.choice(1).finish is FinishReason.LENGTH
    assert all(
        start + count <= 10 + max_tokens - 1
        for plan in bench.runner.plans
        for start, count in zip(plan.starts, plan.counts, strict=True)
    ), "a position was computed that the sequence may never hold"


@pytest.mark.parametrize("stop", range(3, PERIOD))
def test_a_stop_token_among_accepted_drafts_ends_the_choice_there(stop):
    asked = request(1, 10, 60, sampling=REPEATS)  # from its fourth token on it repeats what the prompt says
    tokens = expected_tokens(asked, 0, VOCABULARY)
    stopping = dataclasses.replace(asked, stop_token_ids=frozenset({tokens[stop]}))
    bench = run(Bench(**GUESSING), stopping)
    assert bench.choice(1).finish is FinishReason.STOP_TOKEN
    assert bench.choice(1).tokens == tokens[: stop + 1]
    assert bench.engine.stats().accepted_tokens > 0


def test_no_row_spans_the_end_of_min_tokens():
    """All positions of a row hold stop ids back, or none does."""
    asked = request(1, 10, 60, sampling=REPEATS, min_tokens=30, stop_token_ids=frozenset({996}))
    bench = run(Bench(**GUESSING), asked)
    for plan in bench.runner.plans[1:]:
        first = plan.starts[0] - 10 + 1  # output tokens before the first one this row samples
        last = first + drafts_of(plan)
        assert (plan.flags[0] & ROW_HOLDS_STOPS > 0) == (first < 30) == (last < 30)


@pytest.mark.parametrize("what", ["ends", "breaks"])
@pytest.mark.parametrize("place", range(8, 20))
def test_a_grammar_that_ends_or_breaks_among_drafts_does_so_at_its_token(what, place):
    bench = Bench(**GUESSING)
    bench.grammars.at_once = True
    asked = request(1, 10, 40, sampling=dataclasses.replace(REPEATS, grammar=grammar(f"{what} {place}")))
    bench.submit(asked)
    bench.run()
    assert bench.choice(1).tokens == expected_tokens(asked, 0, VOCABULARY)
    assert (bench.choice(1).finish is FinishReason.GRAMMAR) == (what == "ends")
    assert bench.engine.stats().accepted_tokens > 0


def test_blocks_of_rejected_drafts_are_free_between_steps():
    """`check`, after every step, wants a table to hold the blocks of its computed tokens and no other."""
    bench = Bench(**GUESSING, block_tokens=2)
    run(bench, *(request(n, 10, 60, sampling=SamplingParams(min_p=0.7, seed=n)) for n in range(4)))
    stats = bench.engine.stats()
    assert stats.draft_tokens > stats.accepted_tokens > 0


def test_blocks_that_drafts_completed_are_published_once_they_are_known():
    bench = run(Bench(**GUESSING), request(1, 12, 49, sampling=REPEATS))
    tokens = [*request(1, 12).prompt, *bench.choice(1).tokens]
    run(bench, request(2, tokens, 2, sampling=REPEATS))
    cached = bench.choice(2).cached_tokens or 0
    assert cached >= 48, "only what the last drafts completed may be missing"


def test_a_draft_is_never_published():
    """The scheduler alone: blocks that only drafts would fill are not among a plan's saves."""
    scheduler = Scheduler(capacity(draft_tokens=4), 8)
    sequence = Sequence.of(request(1, [1, 2, 3, 1, 2, 3], 40), 0, 0, b"root")
    scheduler.add([sequence])
    number = 0

    def step(sampled: list[int], accepted: int) -> Step:
        nonlocal number
        number += 1
        planned = scheduler.plan(number)
        assert planned is not None
        scheduler.advance(planned)
        scheduler.commit(planned, (), {sequence: accepted})
        sequence.history.extend(sampled)
        scheduler.check()
        return planned

    step([1], 0)
    planned = step([2, 3, 1], 2)  # six of eight positions were known, then 1; drafts filled the second block
    assert list(planned.plan.tokens) == [1, 2, 3] and list(planned.plan.drafts) == [2]
    assert not planned.plan.saves
    assert sequence.computed == 9 and sequence.offered == 1
    planned = step([2], 0)
    assert list(planned.plan.saves) == [0, 1, sequence.table[1]]
    assert planned.drafts
    assert list(scheduler.plan(9).plan.truncates) == [0, sequence.computed]  # type: ignore[union-attr]


def test_rejected_drafts_are_taken_back_even_of_a_sequence_without_a_row():
    """They would count as resident otherwise, and there would be less room than was planned with."""
    scheduler = Scheduler(capacity(draft_tokens=4), 8)
    sequence = Sequence.of(request(1, [1, 2, 3, 1, 2, 3], 40), 0, 0, b"root")
    scheduler.add([sequence])
    for number, tokens in enumerate(([1], [7])):
        planned = scheduler.plan(number)
        assert planned is not None
        scheduler.advance(planned)
        scheduler.commit(planned, (), {})
        sequence.history.extend(tokens)
    scheduler._decode = lambda outline: None  # type: ignore[method-assign]  # no room for it in this step
    scheduler.add([Sequence.of(request(2, 5, 40), 0, 1, b"root")])
    planned = scheduler.plan(3)
    assert planned is not None
    assert list(planned.plan.slots) == [1]
    assert list(planned.plan.truncates) == [0, 7]
    assert not scheduler._overhanging


def test_a_slot_released_with_rejected_drafts_is_not_truncated():
    bench = Bench(**GUESSING)
    bench.submit(request(1, 10, 110, sampling=SamplingParams(min_p=0.8, seed=4)))
    while not bench.engine._scheduler._overhanging:
        bench.step()
    bench.engine.cancel(request(1).key)
    bench.submit(request(2, 10, 4))
    bench.run()
    bench.check_complete(2)


# Guards


def guessed_beside(others: int, **sizes: int) -> int:
    """Return how many drafts one repeating sequence gets while `others` wandering ones run."""
    bench = Bench(**(GUESSING | {"slots": 32, "step_tokens": 256, "blocks": 512} | sizes))
    bench.submit(*(request(10 + n, 4, 100, seed=n) for n in range(others)))
    bench.submit(request(1, 10, 60, sampling=REPEATS))
    while not bench.choice(1).ended:
        bench.step()
    return bench.engine.stats().draft_tokens


def test_nothing_is_guessed_beside_too_many_running_sequences():
    assert guessed_beside(MOST_RUNNING - 1) > 0
    assert guessed_beside(MOST_RUNNING) == 0


def test_nothing_is_guessed_where_the_runner_verifies_nothing():
    assert guessed_beside(0, draft_tokens=0) == 0


def test_nothing_is_guessed_while_somebody_waits():
    bench = Bench(**GUESSING, slots=1)
    bench.submit(request(1, 10, 40, sampling=REPEATS), request(2, 10, 4, sampling=REPEATS))
    while not bench.choice(1).ended:
        bench.step()
    assert bench.engine.stats().draft_tokens == 0
    bench.run()


def test_nothing_is_guessed_while_a_prompt_is_computed():
    bench = Bench(**GUESSING, sequence_tokens=256, step_tokens=16, blocks=128)
    bench.submit(request(1, 10, 60, sampling=REPEATS))
    for _ in range(10):
        bench.step()
    assert drafts_of(bench.runner.plans[-1]) > 0
    bench.submit(request(2, 150, 2))
    while not bench.choice(2).tokens:
        bench.step()
        assert drafts_of(bench.runner.plans[-1]) == 0
    bench.run()
    bench.check_complete()


@pytest.mark.parametrize(
    "sizes",
    [
        {"step_tokens": 3, "slots": 2},
        {"blocks": 16, "sequence_tokens": 64},
        {"resident_tokens": 64, "sequence_tokens": 64},
    ],
    ids=["budget", "blocks", "residents"],
)
def test_drafts_take_only_what_is_left(sizes):
    """The fake runner refuses plans beyond its budget, its blocks and its room for residents."""
    bench = Bench(**GUESSING, **sizes)
    bench.submit(request(1, 10, 54, sampling=REPEATS))
    bench.run()
    bench.check_complete()
    assert bench.engine.stats().accepted_tokens > 0


def test_drafts_preempt_nobody():
    """Two sequences that just fit beside each other stay so, though each could use the other's room."""
    sizes = {"blocks": 16, "sequence_tokens": 32, "resident_tokens": 64, "slots": 2}
    bench = Bench(**GUESSING, **sizes)
    bench.submit(*(request(n, 8, 24, sampling=REPEATS) for n in range(2)))
    bench.run()
    bench.check_complete()
    stats = bench.engine.stats()
    assert stats.preemptions == 0 and stats.accepted_tokens > 0


def test_the_outline_refuses_drafts_before_the_last_preemption():
    bench = Bench(**GUESSING)
    bench.submit(request(1, 10, 60, sampling=REPEATS))
    bench.step()
    sequence = bench.engine._scheduler.running[0]
    outline = Outline(32, 1000)
    with pytest.raises(KeyError):
        outline.speculate(sequence, array("i", [1]))
    outline.put(sequence, 1)
    outline.speculate(sequence, array("i", [1]))
    with pytest.raises(AssertionError, match="preempt"):
        outline.drop(sequence)


@pytest.mark.parametrize("accepted", [[9], [2, 9], [2, 3, 4]])
def test_a_result_that_accepts_what_was_no_draft_is_no_answer(accepted):
    sequence = Sequence.of(request(1, [1, 2, 3, 1], 40), 0, 0, b"root")
    sequence.computed = 3
    plan = StepPlan(1, *(array("i", [n]) for n in (0, 3, 3, 1)), array("i", [1, 2, 3]), array("i", [2]))
    step = Step(plan, [(sequence, 1)], {sequence: array("i", [2, 3])}, [])
    row = RowResult(0, SampledToken(5), accepted=[SampledToken(token) for token in accepted])
    with pytest.raises(BrokenResult, match="no draft"):
        match(step, StepResult(1, [row]), VOCABULARY)
    row.accepted = [SampledToken(2)]
    assert match(step, StepResult(1, [row]), VOCABULARY) == {sequence: row}
