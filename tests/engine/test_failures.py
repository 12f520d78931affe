"""A step or a row fails: who is lost, who is not, and that the engine goes on."""

from __future__ import annotations

import dataclasses

import pytest

from container.engine.request import ErrorCode, SampledToken, SamplingParams
from container.engine.step import ROW_SAMPLES, RowResult
from tests.engine.bench import VOCABULARY, Bench, request


def fail_step(bench: Bench, number: int) -> None:
    def fault(plan):
        if plan.number == number:
            raise MemoryError

    bench.runner.fault = fault


def test_a_failed_step_costs_the_requests_in_it_and_no_other():
    bench = Bench(slots=2)
    bench.submit(*(request(id, 9, max_tokens=6) for id in range(6)))
    fail_step(bench, 3)
    bench.run()
    lost = [id for id in range(6) if bench.choice(id).error is ErrorCode.INTERNAL]
    assert lost == [0, 1]
    bench.check_complete(2, 3, 4, 5)
    stats = bench.engine.stats()
    assert (stats.failed, stats.completed, stats.failed_steps, bench.runner.resets) == (2, 4, 1, 1)


def test_a_request_that_ran_but_was_not_in_the_failed_step_is_recomputed():
    bench = Bench(blocks=8, sequence_tokens=32, slots=2)
    bench.submit(request(1, 4, max_tokens=28), request(2, 6, max_tokens=20))

    def fault(plan):
        stalled = plan.rows == 1 and bench.engine.stats().running == 2
        if stalled and not bench.runner.resets:
            raise MemoryError

    bench.runner.fault = fault
    bench.run()
    assert bench.runner.resets == 1
    errors = {id: bench.choice(id).error for id in (1, 2)}
    assert sorted(errors.values(), key=str) == [None, ErrorCode.INTERNAL]
    bench.check_complete(next(id for id, error in errors.items() if error is None))


def test_a_failed_step_takes_the_prefix_cache_with_it():
    bench = Bench()
    bench.submit(request(1, range(20)))
    bench.run()
    bench.submit(request(2, 9))
    fail_step(bench, len(bench.runner.plans) + 1)
    bench.run()
    bench.submit(request(3, range(20)))
    bench.run()
    assert bench.choice(3).cached_tokens == 0
    bench.check_complete(1, 3)


def test_all_choices_of_a_request_in_a_failed_step_end_once():
    bench = Bench(slots=2)
    bench.submit(request(1, 9, choices=4))
    fail_step(bench, 2)
    bench.run()
    assert {bench.choice(1, number).error for number in range(4)} == {ErrorCode.INTERNAL}
    assert bench.engine.stats().failed == 1


def test_a_failed_row_costs_its_request_alone():
    bench = Bench()
    bench.submit(*(request(id, 9, max_tokens=6, choices=2) for id in range(3)))
    bench.step()
    bench.runner.bad_rows = lambda plan: {1} if plan.number == 4 else set()
    bench.run()
    failed = [id for id in range(3) if bench.choice(id).error]
    assert len(failed) == 1
    assert {bench.choice(failed[0], number).error for number in (0, 1)} == {ErrorCode.NUMERICAL}
    bench.check_complete(*(id for id in range(3) if id not in failed))
    assert bench.engine.stats().failed_steps == 0


def test_two_failed_choices_are_one_failed_request():
    bench = Bench()
    bench.submit(request(1, 3, choices=2))
    bench.runner.bad_rows = lambda plan: {0, 1}
    bench.run()
    stats = bench.engine.stats()
    assert (stats.failed, stats.in_flight) == (1, 0)


def test_a_runner_that_cannot_be_reset_ends_the_engine():
    bench = Bench()
    bench.submit(request(1))
    fail_step(bench, 1)

    def broken():
        raise OSError

    bench.runner.reset = broken  # type: ignore[method-assign]
    with pytest.raises(OSError):
        bench.engine.step()


def wrong_number(result):
    result.number += 1


def missing_row(result):
    result.rows.pop()


def extra_row(result):
    result.rows.append(RowResult(1))


def no_token(result):
    result.rows[0].sampled = None


def token_too_large(result):
    result.rows[0].sampled = SampledToken(VOCABULARY)


def token_negative(result):
    result.rows[0].sampled = SampledToken(-1)


def too_many_logprobs(result):
    result.rows[0].prompt_logprobs = (SampledToken(1),) * 9


@pytest.mark.parametrize(
    "damage",
    [wrong_number, missing_row, extra_row, no_token, token_too_large, token_negative, too_many_logprobs],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_result_that_does_not_answer_the_plan_is_a_failed_step(damage, logprobs):
    bench = Bench()
    bench.submit(request(1, 9, sampling=SamplingParams(prompt_logprobs=logprobs)))

    def alter(result):
        damage(result)
        return result

    bench.runner.alter = alter
    bench.step()
    assert bench.choice(1).error is ErrorCode.INTERNAL
    bench.runner.alter = lambda result: result
    bench.submit(request(2, 9))
    bench.run()
    bench.check_complete(2)


def test_a_row_that_should_not_sample_may_not():
    bench = Bench(step_tokens=9)
    bench.submit(request(1, 20, sampling=SamplingParams(prompt_logprobs=0)))

    def alter(result):
        assert not bench.runner.plans[-1].flags[0] & ROW_SAMPLES
        result.rows[0] = dataclasses.replace(result.rows[0], sampled=SampledToken(1))
        return result

    bench.runner.alter = alter
    bench.step()
    assert bench.choice(1).error is ErrorCode.INTERNAL
