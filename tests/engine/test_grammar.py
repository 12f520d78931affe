"""Grammars in the engine: stepping aside, keeping one's place, and the ways a grammar ends a request."""

from __future__ import annotations

import pytest

from container.engine.engine import Engine, EngineLimits
from container.engine.grammar import GrammarState
from container.engine.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    GrammarKind,
    Refused,
    RequestKey,
    SamplingParams,
)
from tests.engine.bench import Bench, capacity, request
from tests.engine.fake_grammars import FakeGrammars, grammar
from tests.engine.fake_runner import FakeRunner


def held_to(text: str, id: int = 1, max_tokens: int = 8, **fields: object) -> EngineRequest:
    return request(id, 5, max_tokens, sampling=SamplingParams(seed=id, grammar=grammar(text)), **fields)  # type: ignore[arg-type]


def ready(**sizes: int | bool) -> Bench:
    bench = Bench(**sizes)
    bench.grammars.at_once = True
    return bench


# Stepping aside


def test_a_request_runs_at_once_when_its_grammar_is_known():
    bench = ready()
    bench.submit(held_to("ends 3"))
    bench.step()
    assert len(bench.choice(1).tokens) == 1


def test_a_request_waits_for_its_grammar_without_running_a_step():
    bench = Bench()
    bench.submit(held_to("ends 3"))
    for _ in range(3):
        assert bench.step() == []
    stats = bench.engine.stats()
    assert (stats.steps, stats.waiting, stats.running, stats.in_flight) == (0, 1, 0, 1)
    assert bench.engine.has_work
    bench.grammars.settle("ends 3")
    bench.run()
    bench.check_complete(1)


def test_those_behind_are_not_blocked_by_a_request_that_waits_for_its_grammar():
    bench = Bench(slots=1)
    bench.submit(held_to("ends 3", 1), request(2), request(3))
    while not bench.choice(3).ended:
        bench.step()
    bench.check_complete(2, 3)
    bench.grammars.settle("ends 3")
    bench.run()
    bench.check_complete()


def test_a_request_that_stepped_aside_keeps_its_place():
    bench = Bench(slots=1)
    bench.submit(request(0, max_tokens=3), held_to("ends 3", 1), request(2), request(3))
    bench.step()
    bench.grammars.settle("ends 3")
    order: list[int] = []
    while bench.engine.has_work:
        order += [delta.key.id for delta in bench.step() if delta.finish is not None]
    assert order == [0, 1, 2, 3]


def test_two_requests_with_one_grammar_wait_together_and_hold_it_twice():
    bench = Bench()
    bench.submit(held_to("ends 3", 1), held_to("ends 3", 2))
    assert bench.grammars.holds[grammar("ends 3")] == 2
    bench.grammars.settle("ends 3")
    bench.run()
    bench.check_complete()


def test_the_choices_of_a_request_wait_together_and_count_as_waiting():
    bench = Bench()
    bench.submit(held_to("ends 3", choices=4))
    assert bench.engine.stats().waiting == 4
    bench.grammars.settle("ends 3")
    bench.run()
    bench.check_complete()


def test_requests_that_wait_for_a_grammar_fill_the_queue_like_all_others():
    bench = Bench(EngineLimits(waiting=2, waiting_s=1e9), slots=1)
    bench.submit(*(held_to("ends 3", id) for id in range(3)))  # one for the free slot
    assert bench.engine.refusal(0) is not None
    with pytest.raises(Refused) as caught:
        bench.engine.submit(request(9))
    assert caught.value.code is ErrorCode.QUEUE_FULL


def test_a_draining_engine_finishes_what_waits_for_a_grammar():
    bench = Bench()
    bench.submit(held_to("ends 3"))
    bench.engine.drain()
    bench.step()
    assert bench.engine.has_work
    bench.grammars.settle("ends 3")
    bench.run()
    bench.check_complete()


# Ends


def test_a_complete_grammar_ends_the_choice_and_its_last_token_is_told():
    bench = ready()
    bench.submit(held_to("ends 3"))
    bench.run()
    assert (bench.choice(1).finish, len(bench.choice(1).tokens)) == (FinishReason.GRAMMAR, 3)
    bench.check_complete()


def test_a_complete_grammar_ends_the_choice_before_min_tokens():
    bench = ready()
    bench.submit(held_to("ends 3", min_tokens=6))
    bench.run()
    assert (bench.choice(1).finish, len(bench.choice(1).tokens)) == (FinishReason.GRAMMAR, 3)


def test_a_grammar_complete_with_the_last_token_allowed_is_complete():
    bench = ready()
    bench.submit(held_to("ends 4", max_tokens=4))
    bench.run()
    assert bench.choice(1).finish is FinishReason.GRAMMAR


def test_a_stop_token_that_completes_the_grammar_is_told_as_a_stop_token():
    bench = ready()
    bench.submit(held_to("ends 3", id=1))
    bench.run()
    last = bench.choice(1).tokens[-1]
    assert last not in bench.choice(1).tokens[:-1]
    bench.choices.clear()
    bench.submit(held_to("ends 3", id=1, stop_token_ids=frozenset({last})))
    bench.run()
    assert (bench.choice(1).finish, len(bench.choice(1).tokens)) == (FinishReason.STOP_TOKEN, 3)


def test_an_unfinished_grammar_ends_at_max_tokens_as_any_other_request():
    bench = ready()
    bench.submit(held_to("ends 9", max_tokens=4))
    bench.run()
    assert (bench.choice(1).finish, len(bench.choice(1).tokens)) == (FinishReason.LENGTH, 4)


def test_a_grammar_that_cannot_be_compiled_fails_its_request_and_no_other():
    bench = Bench()
    bench.submit(held_to("ends 3", 1, choices=2), held_to("ends 2", 2), request(3))
    bench.step()
    bench.grammars.settle("ends 3", GrammarState.FAILED)
    bench.grammars.settle("ends 2")
    bench.run()
    assert [bench.choice(1, number).error for number in (0, 1)] == [ErrorCode.GRAMMAR] * 2
    assert bench.engine.stats().failed == 1
    bench.check_complete(2, 3)


def test_a_grammar_that_cannot_be_followed_fails_its_request_and_no_other():
    bench = ready()
    bench.submit(held_to("breaks 3", 1), held_to("ends 5", 2), request(3))
    bench.run()
    assert (bench.choice(1).error, len(bench.choice(1).tokens)) == (ErrorCode.GRAMMAR, 2)
    bench.check_complete(2, 3)


def test_a_grammar_is_let_go_when_its_request_ends_and_not_before():
    bench = ready()
    bench.submit(held_to("ends 3", 1, choices=2))
    held = bench.grammars.holds
    bench.engine.cancel(RequestKey(0, 1), 0)
    assert held[grammar("ends 3")] == 1
    bench.run()
    assert held[grammar("ends 3")] == 0


def test_a_preempted_sequence_ends_where_its_grammar_ends():
    bench = ready(blocks=8, sequence_tokens=32, slots=2, step_tokens=10)
    bench.submit(request(0, 4, max_tokens=28), held_to("ends 22", 1, max_tokens=24))
    bench.run()
    assert bench.engine.stats().preemptions > 0
    assert bench.choice(1).finish is FinishReason.GRAMMAR
    bench.check_complete()


# Refusals and broken results


@pytest.mark.parametrize("missing", ["capacity", "compiler"])
def test_a_grammar_is_refused_where_sampling_cannot_be_held_to_it(missing):
    sizes = capacity(grammar=missing != "capacity")
    engine = Engine(FakeRunner(sizes), grammars=None if missing == "compiler" else FakeGrammars())
    assert not engine.capacity.grammar
    with pytest.raises(Refused) as caught:
        engine.submit(held_to("ends 3"))
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert not engine.has_work


def test_a_refused_request_holds_no_grammar():
    bench = Bench()
    with pytest.raises(Refused):
        bench.engine.submit(held_to("ends 3", max_tokens=10_000))
    assert not bench.grammars.holds


@pytest.mark.parametrize("claim", ["ended", "grammar_failed"])
def test_a_result_that_tells_of_a_grammar_nobody_asked_for_fails_the_step(claim):
    bench = ready()

    def alter(result):
        setattr(result.rows[0], claim, True)
        return result

    bench.runner.alter = alter
    bench.submit(request(1))
    bench.run()
    assert bench.choice(1).error is ErrorCode.INTERNAL


def test_the_repr_of_a_grammar_shows_no_text():
    shown = repr(SamplingParams(grammar=grammar("ends 3 secret")))
    assert "secret" not in shown and GrammarKind.LARK.name in shown
