"""Which tokens each slot's grammar allows next, computed beside the forward pass.

Owns: one matcher per slot that has a grammar, the mask rows, the thread that fills them.
Must not know: logits, how a token is drawn, what else a slot holds.
Invariant: a slot's mask depends on its grammar and its output alone; a slot whose grammar fails stays failed
and touches no other.

    assign -> [prepare -> allowed -> consume] once per token -> release
               thread fills |                    `prepare` again only after it
    A second token of one step (a draft was accepted) has no mask prepared: `allowed` computes it then.

    words  |1101...|0010...|  int32, one bit per token of the tokenizer, one row per prepared slot
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from container.engine.request import Grammar
from container.engine.step import SlotAssignment
from container.model.grammar import GrammarCache

Allowed = NDArray[np.bool_]  # (width of a row of logits,)
WORD_BITS: Final = 32


class Verdict(enum.Enum):
    """What a slot's grammar says after its last token."""

    OPEN = "open"  # more may follow
    COMPLETE = "complete"  # nothing may follow
    FAILED = "failed"  # it could not be compiled, or not be followed within its bounds


@dataclass(slots=True, eq=False)
class _Place:
    """One sequence's place in its grammar."""

    grammar: Grammar = field(repr=False)
    output: list[int] = field(repr=False)  # what was consumed, or is to be replayed at first
    verdict: Verdict = Verdict.OPEN
    matcher: LLMatcher | None = None
    row: int | None = None  # of its mask, from `prepare` on
    fresh: bool = False  # the mask is about the next token


class Masks:
    """Holds slots to their grammars. One thread calls; a second one, started by the first mask, computes.

    `width` is the width of a row of logits, `threads` what may be used beside those of the forward pass.
    """

    def __init__(self, grammars: GrammarCache, width: int, threads: int = 1) -> None:
        self._grammars = grammars
        self._width = width
        self._threads = threads
        self._places: dict[int, _Place] = {}
        self._words = np.zeros((0, 0), np.int32)
        self._filling: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids by which an output may say that it is complete."""
        return [token for token in self._grammars.tokenizer.eos_tokens if token < self._width]

    def assign(self, assignment: SlotAssignment) -> None:
        """Take a slot for a sequence, new or preempted before; one without a grammar is left alone."""
        grammar = assignment.sampling.grammar
        if grammar is None:
            self.release(assignment.slot)
            return
        output = assignment.history[assignment.prompt_tokens :].tolist()
        self._places[assignment.slot] = _Place(grammar, output)

    def release(self, slot: int) -> None:
        self._settle()
        self._places.pop(slot, None)

    def reset(self) -> None:
        self._settle()
        self._places.clear()

    def close(self) -> None:
        """Forget all slots and end the thread."""
        self.reset()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = self._executor = None

    def holds(self, slot: int) -> bool:
        """Return whether a grammar rules the slot."""
        return slot in self._places

    def verdict(self, slot: int) -> Verdict | None:
        """Return what the grammar says after the slot's last token; None where there is none."""
        place = self._places.get(slot)
        return None if place is None else place.verdict

    def prepare(self, slots: Sequence[int]) -> None:
        """Begin to compute the masks of those of `slots` that have a grammar; returns at once."""
        if not self._places:
            return
        self._settle()
        wanted = [self._places[slot] for slot in slots if slot in self._places]
        wanted = [place for place in wanted if place.verdict is not Verdict.FAILED]
        if not wanted:
            return
        for place in self._places.values():
            place.row, place.fresh = None, False  # what was prepared for an earlier step
        for row, place in enumerate(wanted):
            place.row, place.fresh = row, True
        self._filling = self._pool().submit(self._fill, wanted)

    def allowed(self, slot: int) -> Allowed | None:
        """Return which columns of the slot's row may be drawn, or None when its grammar has failed.

        Waits for `prepare`, or does its work. Columns beyond the tokenizer's vocabulary are never allowed.
        """
        place = self._places[slot]
        self._settle()
        if place.row is None:
            self.prepare([slot])
            self._settle()
        elif not place.fresh:  # in its own row: other slots' masks are still to be read
            place.fresh = True
            self._filling = self._pool().submit(self._fill, [place])
            self._settle()
        if place.verdict is Verdict.FAILED:
            return None
        bits = np.unpackbits(self._words[place.row].view(np.uint8), bitorder="little")
        allowed = np.zeros(self._width, np.bool_)
        known = min(self._width, self._grammars.tokenizer.vocab_size)
        allowed[:known] = bits[:known]
        if not allowed.any():
            place.verdict = Verdict.FAILED
            return None
        return allowed

    def consume(self, slot: int, token: int) -> Verdict:
        """Take note of the token drawn for `slot` and return what the grammar says now."""
        place = self._places[slot]
        place.fresh = False
        place.output.append(token)
        matcher = place.matcher
        assert matcher is not None, "a token was drawn without a mask"
        if not matcher.consume_token(token) or matcher.is_error():
            matcher = self._again(place)
        if matcher is None:
            place.verdict = Verdict.FAILED
        elif matcher.is_stopped():
            place.verdict = Verdict.COMPLETE
        return place.verdict

    def _pool(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        return self._thread

    # In the thread that fills

    def _fill(self, places: list[_Place]) -> None:
        if self._executor is None:
            self._executor = LLExecutor(self._threads)
        words = -(-self._grammars.tokenizer.vocab_size // WORD_BITS)
        if len(self._words) < len(places):
            self._words = np.zeros((len(places), words), np.int32)
        for place in places:
            if place.matcher is None:
                place.matcher = self._replayed(place, fresh=False) or self._replayed(place, fresh=True)
        self._compute(places)
        for place in places:
            if place.matcher is not None and place.matcher.is_error():
                # A lexer shared with others may be full of their states: an own one tells whether it is us.
                self._again(place)
                self._compute([place])
            if place.matcher is None or place.matcher.is_error():
                place.verdict = Verdict.FAILED

    def _compute(self, places: list[_Place]) -> None:
        pairs = [(place.matcher, place.row) for place in places if place.matcher is not None]
        assert self._executor is not None, "made before the first mask"
        if pairs:
            fill_next_token_bitmask_par(self._executor, pairs, self._words)  # type: ignore[arg-type]

    def _again(self, place: _Place) -> LLMatcher | None:
        place.matcher = self._replayed(place, fresh=True)
        return place.matcher

    def _replayed(self, place: _Place, *, fresh: bool) -> LLMatcher | None:
        """Return a matcher that has consumed the place's output, or None when it does not get there."""
        matcher = self._grammars.matcher(place.grammar, fresh=fresh)
        if matcher is None or not matcher.consume_tokens(place.output) or matcher.is_error():
            return None
        return matcher

    def _settle(self) -> None:
        """Wait for what is being filled; if that broke off, all of it has failed."""
        filling, self._filling = self._filling, None
        if filling is not None and filling.exception() is not None:
            for place in self._places.values():
                if place.fresh:
                    place.verdict = Verdict.FAILED


def masks_over(grammars: GrammarCache | None, width: int, cores: int) -> Masks | None:
    """Return masks for rows of `width` logits, or None where sampling cannot be held to a grammar.

    Waits until the tokenizer is built.
    """
    if grammars is None or not grammars.available:
        return None
    return Masks(grammars, width, max(1, cores // 4))
