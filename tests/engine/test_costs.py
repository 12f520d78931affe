"""Measured steps decide whether a guess may be worth its time."""

from __future__ import annotations

from container.engine.costs import MOST_TOKENS, RETRY_EVERY, StepCosts
from container.engine.request import SamplingParams
from container.engine.step import StepPlan
from tests.engine.bench import Bench, request


def measured(**seconds: float) -> StepCosts:
    costs = StepCosts()
    for tokens, took_s in seconds.items():
        costs.observe(int(tokens[1:]), took_s)
    return costs


def test_what_was_never_measured_is_worth_trying():
    assert StepCosts().worth(1, 4, 0.1)
    assert measured(t1=1.0).worth(1, 4, 0.1)
    assert measured(t5=1.0).worth(1, 4, 0.1)


def test_drafts_are_worth_it_when_tokens_come_faster():
    costs = measured(t1=1.0, t5=2.0)
    assert costs.worth(1, 4, 1.1) and not costs.worth(1, 4, 0.9)
    costs = measured(t4=1.0, t8=1.5)
    assert costs.worth(4, 4, 2.1) and not costs.worth(4, 4, 1.9)


def test_a_size_that_is_refused_is_measured_again_now_and_then():
    costs = measured(t1=1.0, t5=9.0)
    answers = [costs.worth(1, 4, 3.0) for _ in range(4 * RETRY_EVERY)]
    assert sum(answers) == 4
    for _ in range(8):
        costs.observe(5, 1.5)
    assert costs.worth(1, 4, 3.0)


def test_steps_too_large_or_without_a_duration_are_not_kept():
    costs = StepCosts()
    costs.observe(MOST_TOKENS + 1, 1.0)
    costs.observe(1, 0.0)
    assert not costs._seconds


def drafts_when_a_draft_costs(draft_s: float) -> int:
    bench = Bench(draft_tokens=4, sequence_tokens=256)

    def pass_time(plan: StepPlan) -> None:
        bench.clock.now_s += 1.0 + draft_s * sum(plan.drafts)

    bench.runner.fault = pass_time
    bench.submit(request(1, 10, 200, sampling=SamplingParams(min_p=1.0)))
    bench.run()
    bench.check_complete()
    return sum(plan.rows > 0 and sum(plan.drafts) > 0 for plan in bench.runner.plans)


def test_drafts_that_cost_more_than_they_bring_are_given_up_however_often_they_hold():
    assert drafts_when_a_draft_costs(0.5) > 30
    assert drafts_when_a_draft_costs(1.5) < 12


def test_a_step_that_computes_a_prompt_says_nothing_about_decoding():
    bench = Bench(draft_tokens=4)
    bench.runner.fault = lambda plan: setattr(bench.clock, "now_s", bench.clock.now_s + 1.0)
    bench.submit(request(1, 10, 8))
    bench.run()
    assert set(bench.engine._scheduler.speculation.costs._seconds) == {1}
