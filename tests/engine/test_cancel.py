"""Leaving in every state: once, twice, too late; nothing stays behind."""

from __future__ import annotations

import pytest

from container.engine.grammar import GrammarState
from container.engine.request import EngineRequest, FinishReason, RequestKey, SamplingParams
from container.engine.sequence import State
from tests.engine.bench import VOCABULARY, Bench, request
from tests.engine.fake_grammars import grammar
from tests.engine.fake_runner import expected_tokens

KEY = RequestKey(0, 1)


def waiting(bench: Bench) -> None:
    bench.submit(request(0, 20, max_tokens=8), request(1, 20, max_tokens=8))
    bench.step()


def half_computed(bench: Bench) -> None:
    bench.submit(request(1, 28, max_tokens=2))
    bench.step()


def decoding(bench: Bench) -> None:
    bench.submit(request(1, 5, max_tokens=20))
    bench.step()
    bench.step()


def preempted(bench: Bench) -> None:
    bench.submit(request(0, 4, max_tokens=28), request(1, 4, max_tokens=28))
    while not state_is(bench, State.PREEMPTED):
        bench.step()


def siblings_held(bench: Bench) -> None:
    bench.submit(request(1, 20, max_tokens=8, choices=3))
    bench.step()
    assert state_is(bench, State.HELD)


def siblings_waiting(bench: Bench) -> None:
    bench.submit(request(1, 6, max_tokens=8, choices=8))
    for _ in range(4):
        bench.step()
    assert state_is(bench, State.WAITING) and state_is(bench, State.RUNNING)


def not_stepped(bench: Bench) -> None:
    bench.submit(request(1, 6, choices=3))


def one_choice_done(bench: Bench) -> None:
    bench.submit(request(1, 6, max_tokens=4, choices=3))
    while not bench.choice(1).ended:
        bench.step()


def finished(bench: Bench) -> None:
    bench.submit(request(1, 6))
    bench.run()


def grammar_compiling(bench: Bench) -> None:
    bench.submit(held_to("ends 30", choices=3), request(2, 6))
    bench.step()
    assert state_is(bench, State.ASIDE)


def grammar_compiled_not_stepped(bench: Bench) -> None:
    grammar_compiling(bench)
    bench.grammars.settle("ends 30")


def grammar_ready_waiting(bench: Bench) -> None:
    grammar_compiling(bench)
    bench.submit(request(3, 6, max_tokens=8))
    bench.step()  # both slots are taken
    bench.grammars.settle("ends 30")
    bench.step()
    assert state_is(bench, State.WAITING)


def grammar_running(bench: Bench) -> None:
    bench.grammars.at_once = True
    bench.submit(held_to("ends 30"))
    bench.step()
    bench.step()
    assert state_is(bench, State.RUNNING)


def grammar_preempted(bench: Bench) -> None:
    bench.grammars.at_once = True
    bench.submit(request(0, 4, max_tokens=28), held_to("ends 27", prompt=4, max_tokens=28))
    while not state_is(bench, State.PREEMPTED):
        bench.step()


def grammar_complete(bench: Bench) -> None:
    bench.grammars.at_once = True
    bench.submit(held_to("ends 2"))
    bench.run()


def held_to(text: str, prompt: int = 6, max_tokens: int = 20, choices: int = 1) -> EngineRequest:
    sampling = SamplingParams(grammar=grammar(text))
    return request(1, prompt, max_tokens=max_tokens, sampling=sampling, choices=choices)


def settle_all(bench: Bench) -> None:
    """Compilers go on when a request has left."""
    for held, state in bench.grammars.states.items():
        if state is GrammarState.COMPILING:
            bench.grammars.settle(held.text)


def unknown(bench: Bench) -> None:
    bench.submit(request(7, 6))


def state_is(bench: Bench, state: State) -> bool:
    live = bench.engine._live.get(KEY)
    return live is not None and any(sequence.state is state for sequence in live.open)


SETTINGS = [
    waiting,
    half_computed,
    decoding,
    preempted,
    siblings_held,
    siblings_waiting,
    not_stepped,
    one_choice_done,
    finished,
    unknown,
    grammar_compiling,
    grammar_compiled_not_stepped,
    grammar_ready_waiting,
    grammar_running,
    grammar_preempted,
    grammar_complete,
]


def small(setting) -> Bench:
    slots = 1 if setting is waiting else 2
    bench = Bench(blocks=8, sequence_tokens=32, slots=slots, step_tokens=10)
    setting(bench)
    return bench


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_request_ends_once_and_leaves_nothing_behind(setting, times):
    bench = small(setting)
    live = bench.engine._live.get(KEY)
    open_choices = [sequence.choice for sequence in live.open] if live else []
    before = {number: len(bench.choice(1, number).tokens) for number in open_choices}
    for _ in range(times):
        bench.engine.cancel(KEY)
        bench.engine.check()
    assert KEY not in bench.engine._live
    settle_all(bench)
    bench.run()
    for number in open_choices:
        assert bench.choice(1, number).finish is FinishReason.CANCELLED
        assert len(bench.choice(1, number).tokens) == before[number]
    assert bench.engine.stats().cancelled == bool(open_choices)
    bench.check_each(key for key in bench.requests if key != KEY or not open_choices)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_a_connection_that_is_gone_takes_its_requests_along_in_silence(setting):
    bench = small(setting)
    bench.engine.cancel(KEY)
    bench.engine.cancel_connection(0)
    bench.engine.check()
    assert not bench.engine.has_work
    assert bench.step() == []
    bench.check_idle()


def test_the_connection_s_end_leaves_other_connections_alone():
    bench = Bench()
    bench.submit(request(1, 6, connection=1), request(1, 6, connection=0))
    bench.step()
    bench.engine.cancel_connection(1)
    bench.run()
    bench.check_complete(1)
    assert bench.engine.stats().cancelled == 1


def test_a_cancelled_request_frees_its_slot_and_blocks_before_the_next_step():
    bench = Bench(slots=1)
    bench.submit(request(1, 6, max_tokens=50), request(2, 6))
    bench.step()
    bench.engine.cancel(KEY)
    assert bench.engine.stats().kv_blocks_used == 0
    bench.step()
    assert bench.choice(2).tokens


def test_the_name_of_an_ended_request_can_be_used_again():
    bench = Bench()
    bench.submit(request(1, 6))
    bench.engine.cancel(KEY)
    bench.step()
    bench.choices.clear()
    bench.submit(request(1, 6))
    bench.run()
    bench.check_complete(1)


CHOICES = [
    not_stepped,
    siblings_held,
    siblings_waiting,
    one_choice_done,
    grammar_compiling,
    grammar_compiled_not_stepped,
    grammar_ready_waiting,
]


@pytest.mark.parametrize("setting", CHOICES, ids=lambda setting: setting.__name__)
@pytest.mark.parametrize("place", [0, 1, -1], ids=["first", "second", "last"])
def test_a_cancelled_choice_ends_and_its_siblings_go_on_as_if_nothing_happened(setting, place):
    bench = small(setting)
    leaving = bench.engine._live[KEY].open[place].choice
    for _ in range(2):
        bench.engine.cancel(KEY, leaving)
        bench.engine.check()
    said = len(bench.choice(1, leaving).tokens)
    settle_all(bench)
    bench.run()
    asked = bench.requests[KEY]
    for number in range(asked.choices):
        got = bench.choice(1, number)
        expected = expected_tokens(asked, number, VOCABULARY)
        if number == leaving:
            assert (got.finish, got.tokens) == (FinishReason.CANCELLED, expected[:said])
        else:
            assert (got.finish, got.tokens) == (FinishReason.LENGTH, expected)
    stats = bench.engine.stats()
    assert (stats.cancelled, stats.completed) == (0, stats.accepted)


def test_a_request_whose_choices_are_cancelled_one_by_one_counts_as_cancelled():
    bench = Bench()
    bench.submit(request(1, 6, max_tokens=50, choices=3))
    bench.step()
    for choice in (1, 0, 2):
        assert bench.engine.stats().cancelled == 0
        bench.engine.cancel(KEY, choice)
    assert (bench.engine.stats().cancelled, bench.engine.stats().kv_blocks_used) == (1, 0)
    bench.run()


@pytest.mark.parametrize("choice", [-1, 3, 99])
def test_a_choice_the_request_does_not_have_is_no_error_and_ends_nothing(choice):
    bench = Bench()
    bench.submit(request(1, 6, choices=3))
    bench.engine.cancel(KEY, choice)
    bench.run()
    bench.check_complete()


def test_a_storm_of_cancels_leaks_nothing():
    bench = Bench(blocks=16, sequence_tokens=64)
    for id in range(1000):
        bench.submit(request(id, 1 + id % 40, max_tokens=8))
        if id % 3 == 0:
            bench.step()
        bench.engine.cancel(RequestKey(0, id))
    bench.run()
    assert bench.engine.stats().cancelled + bench.engine.stats().completed == 1000
