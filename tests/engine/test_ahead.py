"""One step ahead: the tokens of step by step, a late end is never visible, nothing waits that need not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from container.engine.engine import Engine
from container.engine.request import ErrorCode, FinishReason, RequestKey, SamplingParams
from container.engine.step import ROW_FED, StepPlan
from tests.engine.ahead_runner import AheadFakeRunner
from tests.engine.bench import VOCABULARY, Bench, request
from tests.engine.fake_grammars import grammar
from tests.engine.fake_runner import expected_tokens


def ahead(**sizes: int | bool) -> tuple[Bench, AheadFakeRunner]:
    bench = Bench(runs_ahead=True, **sizes)
    assert isinstance(bench.runner, AheadFakeRunner)
    return bench, bench.runner


def fed(plan: StepPlan) -> int:
    return sum(flags & ROW_FED > 0 for flags in plan.flags)


def mixed(bench: Bench) -> dict[tuple[RequestKey, int], tuple[list[int], FinishReason | None]]:
    """Joins, leaves, cancels, shared prompts, choices, a grammar and scored prompts; return what was said."""
    preamble = list(range(100, 120))
    bench.grammars.at_once = True
    stops = frozenset(expected_tokens(request(3, 9, 12), 0, VOCABULARY)[4:5])
    bench.submit(request(1, 7, 9), request(2, [*preamble, 1], 6), request(3, 9, 12, stop_token_ids=stops))
    bench.step()
    bench.submit(request(4, [*preamble, 2], 8, choices=2), request(5, 3, 30))
    for _ in range(4):
        bench.step()
    bench.submit(request(6, 5, 7, sampling=SamplingParams(grammar=grammar("ends 4 0"))))
    bench.step()
    bench.engine.cancel(RequestKey(0, 5))
    bench.submit(request(7, 11, 5, sampling=SamplingParams(prompt_logprobs=0)), request(8, 40, 3))
    bench.run()
    return {
        (key, number): (got.tokens, got.finish)
        for (key, number), got in bench.choices.items()
        if key.id != 5  # how far the cancelled one came is a matter of time
    }


def test_a_mixed_load_says_the_same_as_step_by_step() -> None:
    step_by_step, (bench, runner) = mixed(Bench()), ahead()
    assert mixed(bench) == step_by_step
    assert sum(map(fed, runner.plans)) > 10
    assert bench.choice(3).finish is FinishReason.STOP_TOKEN
    assert bench.choice(6).finish is FinishReason.GRAMMAR
    assert bench.engine.stats().prefix_hit_tokens > 0


def test_a_step_is_launched_before_the_one_before_it_is_collected() -> None:
    bench, runner = ahead()
    bench.submit(request(1, 5, max_tokens=6))
    assert bench.step() == [] and len(runner.under_way) == 1
    for made in range(1, 6):
        (delta,) = bench.step()
        assert len(delta.tokens) == 1 and len(runner.plans) == min(made + 1, 6)
    assert [fed(plan) for plan in runner.plans] == [0, 1, 1, 1, 1, 1]
    bench.run()
    bench.check_complete(1)
    assert len(runner.plans) == 6, "a step was run for a token that could not come"


def test_the_row_after_a_stop_token_is_for_nobody() -> None:
    bench, runner = ahead()
    stops = frozenset(expected_tokens(request(1, 5, 20), 0, VOCABULARY)[2:3])
    bench.submit(request(1, 5, 20, stop_token_ids=stops))
    bench.run()
    bench.check_complete(1)
    assert len(bench.choice(1).tokens) == 3 and len(runner.plans) == 4
    assert bench.engine.stats().generated_tokens == 3


def test_work_is_left_until_the_last_row_for_nobody_was_collected() -> None:
    bench, runner = ahead()
    stops = frozenset(expected_tokens(request(1, 5, 20), 0, VOCABULARY)[:1])
    bench.submit(request(1, 5, 20, stop_token_ids=stops))
    bench.step()
    assert bench.step()[0].finish is FinishReason.STOP_TOKEN
    assert bench.engine.has_work and len(runner.under_way) == 1
    assert bench.step() == [] and not bench.engine.has_work and not runner.under_way


def test_a_row_for_nobody_that_fails_fails_nobody() -> None:
    bench, runner = ahead()
    stops = frozenset(expected_tokens(request(1, 5, 20), 0, VOCABULARY)[1:2])
    bench.submit(request(1, 5, 20, stop_token_ids=stops, choices=2, min_tokens=0))
    runner.bad_rows = lambda plan: {0} if plan.number == 3 else set()
    bench.run()
    assert bench.choice(1).finish is FinishReason.STOP_TOKEN
    assert bench.choice(1, 1).error is None and len(bench.choice(1, 1).tokens) > 2


def test_a_cancel_while_a_step_is_under_way_frees_the_slot_for_the_next() -> None:
    bench, runner = ahead(slots=1)
    bench.submit(request(1, 9, 20), request(2, 9, 3))
    for _ in range(3):
        bench.step()
    bench.engine.cancel(RequestKey(0, 1))
    bench.run()
    assert bench.choice(1).finish is FinishReason.CANCELLED
    bench.check_complete(2)
    assert runner.deepest == 2


def test_what_a_grammar_holds_is_waited_for() -> None:
    bench, runner = ahead()
    bench.grammars.at_once = True
    bench.submit(request(1, 5, 9, sampling=SamplingParams(grammar=grammar("ends 3 0"))))
    bench.run()
    assert bench.choice(1).finish is FinishReason.GRAMMAR
    assert runner.deepest == 1 and not any(map(fed, runner.plans))
    assert len(runner.plans) == 3


def test_a_block_is_offered_when_its_last_token_is_known() -> None:
    """A second request finds what the first one made, placeholders are in no key."""
    bench, runner = ahead()
    bench.submit(request(1, 6, 14))
    bench.run()
    said = bench.choice(1).tokens
    saved = [block for plan in runner.plans for block in plan.saves[2::3]]
    assert len(saved) == len(set(saved)) == (6 + 14 - 1) // 4
    bench.submit(request(2, [*bench.requests[RequestKey(0, 1)].prompt, *said[:11]], 3))
    bench.run()
    assert bench.choice(2).cached_tokens == 16
    bench.check_complete(2)


def test_two_that_complete_the_same_block_in_steps_side_by_side_publish_it_once() -> None:
    bench, runner = ahead(slots=2, step_tokens=8)
    prompt = list(range(9))
    bench.submit(request(1, prompt, 4))
    bench.step()
    bench.engine._scheduler._cache.coming = lambda *_: None  # type: ignore[method-assign]
    bench.submit(request(2, prompt, 4))
    bench.run()
    bench.check_complete(1, 2)
    saved = [index for plan in runner.plans for index in plan.saves[1::3]]
    assert saved.count(0) == 1


@pytest.mark.parametrize("step_tokens", [16, 64])
def test_who_begins_alike_waits_until_the_blocks_can_be_found(step_tokens: int) -> None:
    """In the middle of the other's prompt, and while its last part is under way."""
    bench, _ = ahead(step_tokens=step_tokens)
    preamble = list(range(200, 240))
    bench.submit(request(1, [*preamble, 1], 6))
    bench.step()
    bench.submit(request(2, [*preamble, 2], 6))
    bench.run()
    bench.check_complete(1, 2)
    assert bench.choice(2).cached_tokens == 40


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_block_that_was_evicted_is_offered_again(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead, blocks=8, slots=1, sequence_tokens=32)
    for id, prompt in enumerate((range(9), range(100, 130), range(9), range(9))):
        bench.submit(request(id, prompt, 2))
        bench.run()
    assert [bench.choice(id).cached_tokens for id in range(4)] == [0, 0, 0, 8]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_block_whose_step_failed_is_offered_again(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    fails = {1}

    def fault(plan: StepPlan) -> None:
        if plan.number in fails:
            raise RuntimeError

    if isinstance(bench.runner, AheadFakeRunner):
        bench.runner.late_fault = fault
    else:
        bench.runner.fault = fault
    for id in range(3):
        bench.submit(request(id, range(9), 2))
        bench.run()
    assert bench.choice(0).error is ErrorCode.INTERNAL
    assert [bench.choice(id).cached_tokens for id in (1, 2)] == [0, 8]


def late(bench: Bench, runner: AheadFakeRunner, number: int) -> None:
    def fault(plan: StepPlan) -> None:
        if plan.number == number:
            raise RuntimeError

    runner.late_fault = fault


def test_a_step_that_fails_late_costs_its_requests_and_not_those_launched_behind_it() -> None:
    bench, runner = ahead()
    bench.submit(request(1, 9, 6), request(2, 9, 6))
    late(bench, runner, 3)
    for _ in range(3):
        bench.step()
    bench.submit(request(3, 9, 6))  # in step 4, which is launched before step 3 is known to have failed
    bench.run()
    assert [bench.choice(id).error for id in (1, 2, 3)] == [ErrorCode.INTERNAL, ErrorCode.INTERNAL, None]
    bench.check_complete(3)
    assert runner.resets == 1
    assert [plan.rows for plan in runner.plans[:5]] == [2, 2, 2, 3, 1]


def test_a_launch_that_fails_does_not_cost_what_was_under_way() -> None:
    bench, runner = ahead()
    bench.submit(request(1, 9, 2), request(2, 9, 8))

    def fault(plan: StepPlan) -> None:
        if plan.number == 3:
            raise RuntimeError

    runner.fault = fault
    bench.run()
    bench.check_complete(1)  # its last token was in step 2
    assert bench.choice(2).error is ErrorCode.INTERNAL and len(bench.choice(2).tokens) == 2


def test_who_alone_has_no_room_left_is_told_so_after_its_last_token() -> None:
    """The token under way may be the end: whoever is about to stop has not run out of anything."""
    stops = frozenset(expected_tokens(request(1, 5, 12), 0, VOCABULARY)[3:4])
    bench, _ = ahead(blocks=4, sequence_tokens=16, slots=2)
    bench.submit(request(1, 5, 11, stop_token_ids=stops))
    bench.engine._scheduler.pool._free = bench.engine._scheduler.pool._free[-2:]
    for _ in range(20):
        if not bench.engine._live:
            break
        bench.engine.step()
    stats = bench.engine.stats()
    assert (stats.completed, stats.failed) == (1, 0)


def test_a_runner_that_does_not_run_ahead_is_never_launched() -> None:
    bench = Bench()
    bench.submit(request(1))
    assert bench.step() and not hasattr(bench.runner, "launch")
    assert isinstance(bench.engine, Engine) and bench.engine._ahead is None


@pytest.mark.parametrize("waits", [lambda plan: True, lambda plan: plan.number % 3 == 0])
def test_steps_that_are_waited_for_and_steps_that_are_not_say_the_same(
    waits: Callable[[StepPlan], bool],
) -> None:
    bench, runner = ahead()
    runner.waits = waits
    bench.submit(*(request(id, 5 + id, 4 + id) for id in range(5)))
    bench.run()
    bench.check_complete()
