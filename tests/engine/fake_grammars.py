"""Grammars that compile when a test says so, and what the fake runner makes of them.

A text says what happens: `ends 3`: the third output token completes it; `breaks 3`: it fails there.
"""

from __future__ import annotations

from collections import Counter

from container.engine.grammar import GrammarState
from container.engine.request import Grammar, GrammarKind, SamplingParams


def grammar(text: str) -> Grammar:
    return Grammar(GrammarKind.LARK, text)


def turn(sampling: SamplingParams) -> tuple[str, int]:
    """Return what happens to a sequence under its grammar, and with which output token."""
    if sampling.grammar is None:
        return "nothing", 0
    what, _, number = sampling.grammar.text.partition(" ")
    return what, int(number.split()[0])


class FakeHold:
    def __init__(self, grammars: FakeGrammars, held: Grammar) -> None:
        self._grammars = grammars
        self._held = held
        self._released = False

    @property
    def state(self) -> GrammarState:
        assert not self._released, "a grammar is asked about after it was released"
        return self._grammars.states[self._held]

    def release(self) -> None:
        assert not self._released, "a hold is released twice"
        self._released = True
        self._grammars.holds[self._held] -= 1


class FakeGrammars:
    """Compiles nothing by itself unless `at_once`."""

    def __init__(self) -> None:
        self.at_once = False
        self.states: dict[Grammar, GrammarState] = {}
        self.holds: Counter[Grammar] = Counter()

    def prepare(self, grammar: Grammar) -> FakeHold:
        first = GrammarState.READY if self.at_once else GrammarState.COMPILING
        self.states.setdefault(grammar, first)
        self.holds[grammar] += 1
        return FakeHold(self, grammar)

    def settle(self, text: str, state: GrammarState = GrammarState.READY) -> None:
        assert self.states[grammar(text)] is GrammarState.COMPILING
        self.states[grammar(text)] = state

    def usable(self, held: Grammar | None) -> bool:
        return held is None or (self.holds[held] > 0 and self.states[held] is GrammarState.READY)
