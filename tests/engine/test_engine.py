"""One request, from submit to its final delta."""

from __future__ import annotations

import pytest

from container.engine.request import ErrorCode, FinishReason, RequestKey, SamplingParams
from container.engine.step import ROW_HOLDS_STOPS
from tests.engine.bench import VOCABULARY, Bench, request
from tests.engine.fake_runner import expected_tokens, prompt_logprob


def test_a_request_yields_the_tokens_of_the_model_and_one_final_delta():
    bench = Bench()
    bench.submit(request(1, 9, max_tokens=6))
    bench.run()
    bench.check_complete()
    assert bench.choice(1).finish is FinishReason.LENGTH
    assert bench.choice(1).deltas == 6
    assert bench.choice(1).cached_tokens == 0
    assert bench.choice(1).prompt_logprobs is None


def test_nothing_runs_when_there_is_nothing_to_do():
    bench = Bench()
    assert not bench.engine.has_work
    assert bench.step() == []
    bench.submit(request(1))
    bench.run()
    steps = len(bench.runner.plans)
    assert bench.step() == [] and bench.step() == []
    assert len(bench.runner.plans) == steps == bench.engine.stats().steps


def test_a_stop_token_ends_the_choice_and_is_part_of_it():
    plain = request(1, 9, max_tokens=20)
    stop = expected_tokens(plain, 0, VOCABULARY)[3]
    bench = Bench()
    bench.submit(request(1, 9, max_tokens=20, stop_token_ids=frozenset({stop})))
    bench.run()
    assert bench.choice(1).finish is FinishReason.STOP_TOKEN
    assert bench.choice(1).tokens == expected_tokens(plain, 0, VOCABULARY)[:4]


def test_a_stop_token_as_the_last_allowed_token_counts_as_a_stop():
    plain = request(1, 9, max_tokens=4)
    stop = expected_tokens(plain, 0, VOCABULARY)[3]
    bench = Bench()
    bench.submit(request(1, 9, max_tokens=4, stop_token_ids=frozenset({stop})))
    bench.run()
    assert bench.choice(1).finish is FinishReason.STOP_TOKEN


def test_stop_tokens_are_held_exactly_until_min_tokens():
    tokens = expected_tokens(request(1, 9, max_tokens=20), 0, VOCABULARY)
    asked = request(1, 9, max_tokens=20, min_tokens=3, stop_token_ids=frozenset({tokens[1]}))
    bench = Bench()
    bench.submit(asked)
    bench.run()
    bench.check_complete()
    held = [plan.flags[0] & ROW_HOLDS_STOPS for plan in bench.runner.plans]
    assert [bool(flag) for flag in held] == [True] * 3 + [False] * 17


def test_a_stop_token_drawn_although_held_does_not_end_the_choice():
    tokens = expected_tokens(request(1, 9, max_tokens=5), 0, VOCABULARY)
    bench = Bench()
    bench.submit(request(1, 9, max_tokens=5, min_tokens=5, stop_token_ids=frozenset({tokens[0]})))

    def careless(result):
        result.rows[0].sampled = type(result.rows[0].sampled)(tokens[0])
        return result

    bench.runner.alter = careless
    bench.step()
    assert bench.choice(1).finish is None


def test_the_window_can_be_filled_to_its_last_token():
    bench = Bench(sequence_tokens=24)
    bench.submit(request(1, 20, max_tokens=4))
    bench.run()
    bench.check_complete()


def test_a_long_prompt_is_computed_in_chunks_that_end_on_blocks():
    bench = Bench(step_tokens=10)
    bench.submit(request(1, 27, max_tokens=2))
    bench.run()
    bench.check_complete()
    assert [list(plan.counts) for plan in bench.runner.plans] == [[8], [8], [8], [3], [1]]


def test_a_prompt_that_cannot_be_cut_is_computed_in_one_row_beyond_the_budget():
    bench = Bench(step_tokens=10, chunked_prefill=False, prefix_cache=False)
    bench.submit(request(1, 27, max_tokens=3), request(2, 30, max_tokens=3), request(3, 4, max_tokens=3))
    bench.run()
    bench.check_complete()
    assert [len(plan.tokens) for plan in bench.runner.plans[:2]] == [27, 31]


def test_prompt_logprobs_come_once_and_complete_with_the_first_delta():
    sampling = SamplingParams(prompt_logprobs=0)
    for prompt in (1, 2, 4, 5, 27):
        bench = Bench(step_tokens=10)
        asked = request(1, prompt, max_tokens=3, sampling=sampling)
        bench.submit(asked)
        bench.run()
        bench.check_complete()
        wanted = [prompt_logprob(asked.prompt[: end + 1]) for end in range(1, prompt)]
        assert bench.choice(1).prompt_logprobs == wanted


def test_logprobs_of_a_token_reach_the_delta():
    bench = Bench()
    bench.submit(request(1, sampling=SamplingParams(top_logprobs=0)))
    assert bench.step()[0].tokens[0].logprob == -1.0


def test_choices_are_numbered_seeded_apart_and_each_ends_once():
    bench = Bench()
    bench.submit(request(1, 10, max_tokens=5, choices=4, seed=77))
    bench.run()
    bench.check_complete()
    outputs = {tuple(bench.choice(1, number).tokens) for number in range(4)}
    assert len(outputs) == 4
    assert bench.engine.stats().completed == 1


def test_draining_finishes_what_was_accepted_and_refuses_the_rest():
    bench = Bench()
    bench.submit(*(request(id, 9) for id in range(12)))
    bench.step()
    bench.engine.drain()
    with pytest.raises(Exception, match=ErrorCode.DRAINING.value):
        bench.engine.submit(request(99))
    bench.run()
    bench.check_complete(*range(12))
    assert bench.engine.stats().draining


def test_counts_add_up():
    bench = Bench()
    bench.submit(request(1, 9, 5), request(2, 9, 5, choices=2), request(3, 9, 5))
    with pytest.raises(Exception, match=ErrorCode.INVALID.value):
        bench.engine.submit(request(4, 0))
    bench.step()
    bench.engine.cancel(RequestKey(0, 3))
    bench.run()
    stats = bench.engine.stats()
    assert (stats.accepted, stats.completed, stats.cancelled, stats.failed, stats.refused) == (3, 2, 1, 0, 1)
    assert stats.prompt_tokens == 27
    assert stats.generated_tokens == sum(len(choice.tokens) for choice in bench.choices.values())
    assert stats.kv_blocks_total == 64
    assert stats.steps == len(bench.runner.plans)


def test_the_duration_of_a_step_is_the_runner_s():
    bench = Bench()
    bench.submit(request(1))

    def slow(plan):
        bench.clock.now_s += 2.5

    bench.runner.fault = slow
    bench.step()
    assert bench.engine.stats().last_step_s == pytest.approx(2.5)


def test_steps_are_numbered_without_gaps():
    bench = Bench()
    bench.submit(request(1))
    bench.run()
    bench.submit(request(2))
    bench.run()
    assert [plan.number for plan in bench.runner.plans] == list(range(1, len(bench.runner.plans) + 1))


def test_no_repr_shows_a_token():
    bench = Bench()
    bench.submit(request(1, [701, 702, 703, 704, 705], cache_salt="secret-salt"))
    sequence = bench.engine._scheduler.queue.head()
    bench.step()
    plan = bench.runner.plans[0]
    shown = f"{sequence!r} {plan!r} {bench.engine._names!r} {bench.engine.stats()!r}"
    shown += repr(bench.engine._scheduler.pool._published)
    assert not any(secret in shown for secret in ("701", "702", "secret-salt", "prompt=", "history="))
