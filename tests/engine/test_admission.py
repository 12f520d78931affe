"""What enters, what is refused by which code, and when a client is told to come back."""

from __future__ import annotations

import math
from array import array

import pytest

from container.engine.admission import EngineLimits, Gate, Pace
from container.engine.engine import Engine
from container.engine.request import EngineRequest, ErrorCode, Refused, RequestKey, SamplingParams
from tests.engine.bench import VOCABULARY, Bench, capacity, request
from tests.engine.fake_runner import FakeRunner


def refusal(bench: Bench, asked: EngineRequest) -> Refused:
    before = bench.engine.stats()
    with pytest.raises(Refused) as caught:
        bench.engine.submit(asked)
    after = bench.engine.stats()
    assert after.refused == before.refused + 1
    assert (after.accepted, after.waiting, after.in_flight) == (
        before.accepted,
        before.waiting,
        before.in_flight,
    )
    bench.engine.check()
    return caught.value


def steady(pace: Pace, *, answers: int, seconds: float) -> None:
    """Have a full engine give `answers` of ten tokens in `seconds`."""
    pace.observe(10 * answers, seconds)
    for _ in range(answers):
        pace.answered(10)


def timed(bench: Bench, step_s: float) -> Bench:
    """Have the runner take `step_s` for each step."""
    bench.runner.fault = lambda plan: setattr(bench.clock, "now_s", bench.clock.now_s + step_s)
    return bench


MALFORMED = {
    "empty prompt": {"prompt": []},
    "token too large": {"prompt": [1, VOCABULARY]},
    "negative token": {"prompt": [-1]},
    "no tokens wanted": {"max_tokens": 0},
    "negative min_tokens": {"min_tokens": -1},
    "min above max": {"min_tokens": 5, "max_tokens": 4},
    "no choices": {"choices": 0},
    "too many choices": {"choices": 17},
    "stop id too large": {"stop_token_ids": frozenset({VOCABULARY})},
    "negative stop id": {"stop_token_ids": frozenset({-1})},
    "salt with a space": {"cache_salt": "a b"},
    "salt with a line break": {"cache_salt": "ab\n"},
    "salt of another alphabet": {"cache_salt": "é"},
    "salt too long": {"cache_salt": "a" * 65},
}

UNDRAWABLE = {
    "negative temperature": {"temperature": -0.1},
    "endless temperature": {"temperature": math.inf},
    "no number as temperature": {"temperature": math.nan},
    "negative top_k": {"top_k": -1},
    "top_p zero": {"top_p": 0.0},
    "top_p above one": {"top_p": 1.1},
    "no number as top_p": {"top_p": math.nan},
    "min_p negative": {"min_p": -0.1},
    "min_p above one": {"min_p": 1.1},
    "typical_p zero": {"typical_p": 0.0},
    "typical_p above one": {"typical_p": 1.1},
    "repetition zero": {"repetition_penalty": 0.0},
    "repetition endless": {"repetition_penalty": math.inf},
    "frequency too low": {"frequency_penalty": -2.1},
    "frequency too high": {"frequency_penalty": 2.1},
    "presence too low": {"presence_penalty": -2.1},
    "presence too high": {"presence_penalty": 2.1},
    "bias id too large": {"logit_bias": ((VOCABULARY, 1.0),)},
    "bias id negative": {"logit_bias": ((-1, 1.0),)},
    "bias no number": {"logit_bias": ((1, math.nan),)},
    "bias endless": {"logit_bias": ((1, math.inf),)},
    "seed negative": {"seed": -1},
    "seed too large": {"seed": 1 << 64},
    "too many top logprobs": {"top_logprobs": 21},
    "negative top logprobs": {"top_logprobs": -1},
    "too many prompt logprobs": {"prompt_logprobs": 21},
    "negative prompt logprobs": {"prompt_logprobs": -1},
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_refused(fields):
    assert refusal(Bench(), request(1, **fields)).code is ErrorCode.INVALID


@pytest.mark.parametrize("fields", UNDRAWABLE.values(), ids=UNDRAWABLE.keys())
def test_a_request_that_no_sampler_could_serve_is_refused(fields):
    assert refusal(Bench(), request(1, sampling=SamplingParams(**fields))).code is ErrorCode.INVALID


def test_a_prompt_of_other_integers_is_refused():
    asked = EngineRequest(RequestKey(0, 1), array("q", [1, 2]), 1, SamplingParams())
    assert refusal(Bench(), asked).code is ErrorCode.INVALID


def test_the_widest_allowed_request_is_accepted():
    bench = Bench()
    sampling = SamplingParams(
        temperature=0.0,
        top_p=1.0,
        min_p=1.0,
        repetition_penalty=0.1,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        logit_bias=((VOCABULARY - 1, -100.0),),
        seed=(1 << 64) - 1,
        top_logprobs=20,
        prompt_logprobs=20,
    )
    fields = {"choices": 16, "min_tokens": 4, "cache_salt": "aZ09_-" + "x" * 58}
    bench.submit(request(1, [0, VOCABULARY - 1], 4, sampling=sampling, **fields))
    bench.run()
    bench.check_complete()


def test_a_live_key_cannot_be_used_twice():
    bench = Bench()
    bench.submit(request(1))
    assert refusal(bench, request(1)).code is ErrorCode.INVALID
    bench.submit(request(1, connection=2))


def test_prompt_logprobs_are_refused_where_the_runner_has_none():
    bench = Bench(prompt_logprobs=False)
    asked = request(1, sampling=SamplingParams(prompt_logprobs=0))
    assert refusal(bench, asked).code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ({"sequence_tokens": 24}, 24),
        ({"blocks": 5, "sequence_tokens": 128}, 20),
        ({"resident_tokens": 19, "sequence_tokens": 128}, 19),
    ],
    ids=["window", "pool", "residents"],
)
def test_what_is_accepted_can_run_alone_and_one_token_more_is_refused(sizes, tokens):
    bench = Bench(**sizes)
    assert refusal(bench, request(1, tokens - 2, 3)).code is ErrorCode.CONTEXT_LENGTH
    assert refusal(bench, request(1, tokens, 1)).code is ErrorCode.CONTEXT_LENGTH
    bench.submit(request(1, tokens - 2, 2))
    bench.run()
    bench.check_complete()


def test_free_slots_are_room_and_then_the_queue_has_a_bound():
    bench = Bench(EngineLimits(running=3, waiting=2))
    bench.submit(*(request(id) for id in range(5)))
    refused = refusal(bench, request(99))
    assert refused.code is ErrorCode.QUEUE_FULL and refused.retry_after_s == 1
    bench.step()
    assert bench.engine.stats().running == 3
    assert refusal(bench, request(99)).code is ErrorCode.QUEUE_FULL
    bench.engine.cancel(RequestKey(0, 4))
    bench.submit(request(99))


def test_room_can_be_asked_for_ahead_of_submitting_and_counts_those_on_their_way():
    bench = Bench(EngineLimits(running=2, waiting=3))
    assert bench.engine.refusal(4) is None  # two slots and three places
    full = bench.engine.refusal(5)
    assert full is not None and full.code is ErrorCode.QUEUE_FULL and full.retry_after_s is not None
    bench.submit(request(1))
    assert bench.engine.refusal(3) is None
    assert bench.engine.refusal(4) is not None
    bench.step()  # it runs now, in a slot of its own
    assert bench.engine.refusal(3) is None
    assert bench.engine.refusal(4) is not None
    assert bench.engine.stats().refused == 0  # asking is not being refused


def test_held_siblings_count_as_waiting():
    bench = Bench(EngineLimits(running=3, waiting=2))
    bench.submit(request(1, 20, choices=6))
    assert refusal(bench, request(2)).code is ErrorCode.QUEUE_FULL


def test_the_running_limit_holds_below_the_runner_s_slots():
    bench = Bench(EngineLimits(running=2))
    bench.submit(*(request(id) for id in range(6)))
    for _ in range(8):
        bench.step()
        assert bench.engine.stats().running <= 2
    bench.run()
    bench.check_complete()


def test_a_long_estimated_wait_refuses_before_the_queue_is_full():
    bench = timed(Bench(EngineLimits(running=1, waiting=100, waiting_s=5.0)), 1.0)
    for id in range(5):  # one request a second
        bench.submit(request(id, max_tokens=1))
        bench.run()
    bench.submit(request(10, max_tokens=50))
    bench.step()
    for id in range(11, 15):
        bench.submit(request(id))
    bench.submit(request(15))
    refused = refusal(bench, request(16))  # six ahead, at a second each
    assert (refused.code, refused.retry_after_s) == (ErrorCode.QUEUE_FULL, 6)


def test_those_who_leave_the_queue_do_not_count_as_served():
    bench = Bench(EngineLimits(running=1, waiting=100))
    bench.submit(*(request(id, max_tokens=20) for id in range(20)))
    bench.step()
    for id in range(5, 20):
        bench.engine.cancel(RequestKey(0, id))
    bench.step()
    assert bench.engine._gate.pace.wait_s(1) is None


def test_a_free_slot_is_never_refused_for_its_wait():
    gate = Gate(capacity(), EngineLimits(running=4, waiting=1, waiting_s=0.001))
    steady(gate.pace, answers=10, seconds=1000.0)
    gate.check_room(running=3, waiting=0)
    with pytest.raises(Refused):
        gate.check_room(running=4, waiting=0)


@pytest.mark.parametrize(("busy_s", "retry_after_s"), [(1.0, 1), (95.0, 10), (9000.0, 30)])
def test_the_advice_when_to_retry_is_the_estimate_within_bounds(busy_s, retry_after_s):
    gate = Gate(capacity(), EngineLimits(running=4, waiting=0))
    steady(gate.pace, answers=10, seconds=busy_s)
    with pytest.raises(Refused) as caught:
        gate.check_room(running=4, waiting=0)
    assert caught.value.retry_after_s == retry_after_s


def test_the_pace_forgets_old_load_and_says_nothing_on_few_answers():
    pace = Pace()
    assert pace.wait_s(1) is None and pace.wait_s(0) == 0.0
    steady(pace, answers=3, seconds=1.0)
    assert pace.wait_s(1) is None
    steady(pace, answers=100, seconds=10.0)
    assert pace.wait_s(10) == pytest.approx(1.0, rel=0.15)
    for _ in range(400):
        steady(pace, answers=1, seconds=1.0)
    assert pace.wait_s(10) == pytest.approx(10.0, rel=0.05)
    for _ in range(400):  # as fast, but every answer is twice as long
        pace.observe(10, 1.0)
        pace.answered(20)
    assert pace.wait_s(10) == pytest.approx(20.0, rel=0.05)


def test_answers_without_a_full_step_and_full_steps_without_a_token_tell_nothing():
    pace = Pace()
    for _ in range(9):
        pace.answered(10)
    assert pace.wait_s(1) is None
    pace.observe(0, 1.0)
    assert pace.wait_s(1) is None


def test_a_cold_engine_takes_a_first_burst_up_to_its_bound_and_answers_all_of_it():
    bench = timed(Bench(EngineLimits(waiting=56, waiting_s=0.1)), 10.0)
    bench.submit(*(request(id, max_tokens=20) for id in range(64)))
    assert refusal(bench, request(64)).retry_after_s == 1
    bench.run()
    bench.check_complete()


def test_a_burst_in_the_midst_of_its_first_steps_is_taken_too():
    bench = timed(Bench(EngineLimits(waiting=56, waiting_s=0.1)), 10.0)
    for id in range(64):
        bench.submit(request(id, max_tokens=100))
        if id % 4 == 0:
            bench.step()
    assert bench.engine.stats().refused == 0


def test_an_engine_that_served_one_by_one_takes_a_burst_as_a_cold_one_does():
    bench = timed(Bench(EngineLimits(waiting=56, waiting_s=5.0)), 0.5)
    for id in range(20):
        bench.submit(request(id))
        bench.run()
    bench.submit(*(request(id) for id in range(100, 164)))
    bench.run()
    bench.check_complete()


def test_what_requests_declare_plays_no_part_in_the_estimate():
    def estimate(max_tokens: int) -> float | None:
        bench = timed(Bench(slots=2), 1.0)
        everything = frozenset(range(VOCABULARY))
        bench.submit(*(request(id, 5, max_tokens, stop_token_ids=everything) for id in range(20)))
        bench.run()
        return bench.engine._gate.pace.wait_s(10)

    assert estimate(1) == estimate(100) == pytest.approx(5.0, rel=0.2)  # two slots, one token, one second


def test_what_was_done_to_warm_up_is_forgotten():
    bench = Bench(EngineLimits(waiting=10, waiting_s=0.001), slots=1, step_tokens=8)
    for _ in range(2):
        for id in range(8):
            bench.submit(request(id, 12))
            bench.run()
        assert bench.engine._gate.pace.wait_s(1) is not None
        bench.engine.forget_history()
        stats = bench.engine.stats()
        assert (stats.accepted, stats.completed, stats.steps, stats.generated_tokens) == (0, 0, 0, 0)
        assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (0, 0)
        assert bench.engine._gate.pace.wait_s(1) is None
        bench.choices.clear()
    numbers = [plan.number for plan in bench.runner.plans]
    assert numbers == sorted(set(numbers)), "a runner sees each number once"


def test_refusals_do_not_quote_the_request():
    shown = repr(refusal(Bench(), request(1, [VOCABULARY + 4711])))
    assert "4711" not in shown and str(VOCABULARY + 4711) not in shown


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        (EngineLimits(running=9), {}),
        (EngineLimits(running=0), {}),
        (EngineLimits(waiting=-1), {}),
        (EngineLimits(waiting_s=0.0), {}),
        (EngineLimits(waiting_s=math.nan), {}),
        (EngineLimits(), {"step_tokens": 8}),
    ],
    ids=["above slots", "none", "negative queue", "no wait", "no number", "decodes fill the step"],
)
def test_limits_that_cannot_be_kept_stop_the_start(limits, sizes):
    with pytest.raises(ValueError, match="must be"):
        Engine(FakeRunner(capacity(**sizes)), limits)


def test_limits_are_derived_from_the_runner():
    assert EngineLimits().resolve(capacity()) == (8, 32)
    assert Bench().engine.running_limit == 8
