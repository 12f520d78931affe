"""Compiled grammars: shared, bounded, held while somebody needs them, failing in good time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from llguidance import LLMatcher

from container.engine.grammar import GrammarState
from container.engine.request import Grammar, GrammarKind
from container.model.grammar import (
    BYTES_PER_CHAR,
    COMPILE_LIMIT_S,
    GRAMMAR_BYTES,
    PARSER_LIMITS,
    GrammarCache,
    Hold,
)
from container.text import grammar_child
from tests.model.test_masks import BROKEN, EOS, WORD, byte_tokenizer, wait_for

ONE = GRAMMAR_BYTES + 100 * BYTES_PER_CHAR  # bytes that a grammar of less than 100 letters may count


def word(number: int) -> Grammar:
    return Grammar(GrammarKind.REGEX, f"word {number}")


class Paused(GrammarCache):
    """Compiles one grammar after another, each when it is let go."""

    def __init__(self, **bounds: int) -> None:
        self.gate = threading.Semaphore(0)
        self.compiled: list[Grammar] = []
        self.now_s = 0.0
        super().__init__(byte_tokenizer(), [EOS], clock=lambda: self.now_s, **bounds)

    def _compile(self, grammar: Grammar) -> LLMatcher | None:
        assert self.gate.acquire(timeout=20)
        self.compiled.append(grammar)
        return super()._compile(grammar)


def until(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.002)


@pytest.fixture
def paused() -> Iterator[Paused]:
    cache = Paused()
    yield cache
    cache.gate.release(100)
    cache.close()


@pytest.fixture
def cache() -> Iterator[GrammarCache]:
    made = GrammarCache(byte_tokenizer(), [EOS], grammars=3)
    yield made
    made.check()
    made.close()


def test_preparing_returns_before_the_grammar_is_compiled(paused: Paused) -> None:
    hold = paused.prepare(WORD)
    assert hold.state is GrammarState.COMPILING
    paused.gate.release()
    wait_for([hold])


def test_a_grammar_is_compiled_once_for_all_who_ask(paused: Paused) -> None:
    holds = [paused.prepare(Grammar(GrammarKind.REGEX, "same")) for _ in range(5)]
    paused.gate.release(5)
    wait_for(holds)
    later = paused.prepare(Grammar(GrammarKind.REGEX, "same"))
    assert later.state is GrammarState.READY
    assert len(paused.compiled) == 1


def test_one_text_in_two_languages_is_two_grammars(paused: Paused) -> None:
    paused.gate.release(5)
    holds = [paused.prepare(Grammar(kind, "{}")) for kind in (GrammarKind.REGEX, GrammarKind.JSON_SCHEMA)]
    until(lambda: all(hold.state is not GrammarState.COMPILING for hold in holds))
    assert len(paused.compiled) == 2


@pytest.mark.parametrize(
    "grammar",
    [
        BROKEN,
        Grammar(GrammarKind.JSON_SCHEMA, "{"),
        Grammar(GrammarKind.JSON_SCHEMA, '{"type": "strange"}'),
        Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/$defs/absent"}'),
        Grammar(GrammarKind.LARK, "start: nowhere"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_fails_in_silence(
    cache: GrammarCache, grammar: Grammar, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hold = cache.prepare(grammar)
    wait_for([hold], GrammarState.FAILED)
    assert cache.matcher(grammar) is None
    hold.release()
    assert (capfd.readouterr(), caplog.text) == (("", ""), "")


def test_a_failed_grammar_is_tried_again_when_all_who_asked_have_left(paused: Paused) -> None:
    paused.gate.release(5)
    first, second = paused.prepare(BROKEN), paused.prepare(BROKEN)
    wait_for([first, second], GrammarState.FAILED)
    first.release()
    assert paused.prepare(BROKEN).state is GrammarState.FAILED
    assert len(paused.compiled) == 1


def test_grammars_that_nobody_holds_are_evicted_longest_unused_first(cache: GrammarCache) -> None:
    for number in (0, 1, 2, 0, 3):
        hold = cache.prepare(word(number))
        wait_for([hold])
        hold.release()
        cache.check()
    known = [cache.prepare(word(number)).state is GrammarState.READY for number in (0, 2, 3, 1)]
    assert known[:3] == [True, True, True] and not known[3]


def test_grammars_that_are_held_stay_and_newcomers_wait_for_room(cache: GrammarCache) -> None:
    held = [cache.prepare(word(number)) for number in range(3)]
    wait_for(held)
    waits = cache.prepare(word(3))
    time.sleep(0.05)
    assert waits.state is GrammarState.COMPILING
    assert all(hold.state is GrammarState.READY for hold in held)
    held[1].release()
    wait_for([waits, held[0], held[2]])


def test_the_bytes_of_all_grammars_together_are_bounded() -> None:
    cache = GrammarCache(byte_tokenizer(), [EOS], cached_bytes=2 * ONE)
    held = [cache.prepare(word(number)) for number in range(2)]
    wait_for(held)
    waits = cache.prepare(word(2))
    time.sleep(0.05)
    assert waits.state is GrammarState.COMPILING
    held[0].release()
    wait_for([waits])
    cache.check()
    cache.close()


def test_a_grammar_larger_than_all_room_is_compiled_alone() -> None:
    cache = GrammarCache(byte_tokenizer(), [EOS], cached_bytes=1)
    first, second = cache.prepare(word(0)), cache.prepare(word(1))
    wait_for([first])
    assert second.state is GrammarState.COMPILING
    first.release()
    wait_for([second])
    cache.close()


def test_who_leaves_while_it_compiles_leaves_nothing_behind(paused: Paused) -> None:
    begun, queued = paused.prepare(word(0)), paused.prepare(word(1))
    until(lambda: paused._busy_since_s is not None)
    begun.release()
    queued.release()
    paused.gate.release(5)
    until(lambda: paused._busy_since_s is None)
    assert paused.compiled == [word(0)]
    assert not paused._entries and not paused._queue


def test_what_takes_too_long_fails_with_all_that_wait_behind_it(paused: Paused) -> None:
    slow, behind = paused.prepare(word(0)), paused.prepare(word(1))
    until(lambda: paused._busy_since_s is not None)
    paused.now_s += COMPILE_LIMIT_S
    assert slow.state is GrammarState.COMPILING
    paused.now_s += 0.1
    assert (slow.state, behind.state) == (GrammarState.FAILED, GrammarState.FAILED)
    slow.release()
    behind.release()
    paused.gate.release(5)
    again = paused.prepare(word(2))
    wait_for([again])


def test_a_hold_is_released_once(cache: GrammarCache) -> None:
    hold = cache.prepare(WORD)
    wait_for([hold])
    hold.release()
    with pytest.raises(AssertionError, match="twice"):
        hold.release()


def test_a_matcher_of_a_grammar_that_was_evicted_is_compiled_again(cache: GrammarCache) -> None:
    matcher = cache.matcher(WORD)
    assert matcher is not None and matcher.consume_token(ord("y"))


def test_matchers_of_one_grammar_do_not_move_each_other(cache: GrammarCache) -> None:
    hold = cache.prepare(WORD)
    wait_for([hold])
    first, second = cache.matcher(WORD), cache.matcher(WORD)
    assert first is not None and second is not None
    assert first.consume_token(ord("y")) and second.consume_token(ord("n"))
    assert not first.consume_token(ord("o")) and second.consume_token(ord("o"))


def test_random_holds_from_many_threads_keep_the_bounds(cache: GrammarCache) -> None:
    failures: list[BaseException] = []

    def ask(first: int) -> None:
        try:
            for number in range(first, first + 40):
                hold = cache.prepare(word(number % 7))
                if number % 3:
                    wait_for([hold])
                    assert cache.matcher(word(number % 7)) is not None
                hold.release()
                cache.check()
        except BaseException as error:  # noqa: BLE001 - told to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_the_cache_keeps_no_thread_once_it_is_closed() -> None:
    cache = GrammarCache(byte_tokenizer(), [EOS])
    hold: Hold = cache.prepare(WORD)
    wait_for([hold])
    worker = cache._worker
    cache.close()
    assert worker is not None
    worker.join(10)
    assert not worker.is_alive()
    hold.release()


def test_the_front_checks_grammars_under_the_limits_they_are_followed_under() -> None:
    assert dict(PARSER_LIMITS) == grammar_child.LIMITS
