"""Requests that wait for their grammar, and the seam to whoever compiles it.

Owns: the Grammars protocol, who stands aside and until when.
Must not know: what a grammar says, masks, tokens, threads. Standard library only.
Invariant: a request holds its grammar from its arrival to its end, once; what stands aside keeps its age and
stands in nobody's way.
"""

from __future__ import annotations

import enum
from typing import Protocol

from container.engine.request import Grammar, RequestKey
from container.engine.sequence import Sequence, State


class GrammarState(enum.Enum):
    """How far a grammar is."""

    COMPILING = "compiling"
    READY = "ready"
    FAILED = "failed"  # it cannot be compiled within its bounds


class Compilation(Protocol):
    """One request's hold on a compiled grammar."""

    @property
    def state(self) -> GrammarState:
        """READY stays READY until `release`."""

    def release(self) -> None:
        """Nobody waits for it any more. Once per compilation."""


class Grammars(Protocol):
    """Compiles grammars beside the step loop and keeps what it compiled, within bounds."""

    def prepare(self, grammar: Grammar) -> Compilation:
        """Begin to compile `grammar`, unless it is known; returns at once."""


class Aside:
    """Choices of requests whose grammar is not ready. They are ASIDE until `settle` hands them on."""

    def __init__(self) -> None:
        self._waiting: dict[RequestKey, tuple[Compilation, list[Sequence]]] = {}

    def __len__(self) -> int:
        """Sequences, not requests."""
        return sum(len(choices) for _, choices in self._waiting.values())

    def put(self, choices: list[Sequence], compilation: Compilation) -> None:
        """Set the choices of one request, all NEW, aside."""
        for sequence in choices:
            sequence.move(State.ASIDE)
        self._waiting[choices[0].key] = (compilation, choices)

    def discard(self, sequence: Sequence) -> None:
        """Finish a sequence that is ASIDE."""
        _, choices = self._waiting[sequence.key]
        choices.remove(sequence)
        if not choices:
            del self._waiting[sequence.key]
        sequence.move(State.FINISHED)

    def settle(self) -> tuple[list[list[Sequence]], list[RequestKey]]:
        """Return the choices whose grammar is ready now, which wait no longer, and the requests whose failed.

        The failed stay until they are discarded.
        """
        ready: list[list[Sequence]] = []
        failed: list[RequestKey] = []
        for key, (compilation, choices) in list(self._waiting.items()):
            state = compilation.state
            if state is GrammarState.READY:
                del self._waiting[key]
                ready.append(choices)
            elif state is GrammarState.FAILED:
                failed.append(key)
        return ready, failed
