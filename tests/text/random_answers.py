"""Answers a model without any sense would give: random tokens under the mask of a grammar, brought to an end.

Owns: the sampler. Must not know: keywords of schemas but `pattern`, what the answers are compared with.
Invariant: the mask alone decides what is allowed, at every token. For LONG_TOKENS nearly any allowed token
may be drawn; then the sampler looks for the end as a model would that knows what it wants to say, so that
an answer that has no end is a fault of the grammar and not of the draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tests.text.pattern_examples import examples

LONG_TOKENS = 60
MOST_TOKENS = 2400
SEARCHES = 4  # tokens from one search for a string's end to the next
HURRIES = 0.15  # of the tokens before LONG_TOKENS are drawn as after it
# Outside of strings, in order: what ends a value, what leads to the next one that must come, short values.
STRUCTURE = '}],:"0123456789efnrtuals.-+E[{'


class RandomAnswers:
    """Draws whole answers for JSON schemas over one tokenizer that has a piece for each byte."""

    def __init__(self, tokenizer: str, eos: int, seed: int) -> None:
        self._tokenizer = LLTokenizer(tokenizer, eos_token=[eos])
        self._limits = LLParserLimits(verbose_errors=False)
        self._eos = eos
        self._draw = np.random.default_rng(seed)
        self._pieces = [self._tokenizer.decode_bytes([token]) for token in range(self._tokenizer.vocab_size)]
        self._token = {piece: token for token, piece in enumerate(self._pieces) if len(piece) == 1}
        self._structure = [self._token[character.encode()] for character in STRUCTURE]
        printable = (bytes([code]) for code in range(33, 127))
        self._signs = [self._token[sign] for sign in printable if not sign.isalnum() and sign not in b'"\\']
        self._quote = self._token[b'"']

    def one(self, schema: str) -> bytes | None:
        """Return a finished answer, None when MOST_TOKENS were not enough for one."""
        grammar = LLMatcher.grammar_from_json_schema(schema)
        matcher = LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
        answer = _Answer(self, matcher, examples(schema))
        while len(answer.tokens) < MOST_TOKENS:
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            assert not matcher.is_error(), "a grammar that was accepted cannot be followed"
            allowed = np.unpackbits(mask, bitorder="little").astype(bool)
            assert allowed.any(), "nothing may be drawn, not even the end"
            token = answer.next(allowed)
            if token == self._eos:
                assert matcher.is_accepting()
                return answer.text
            assert matcher.consume_token(token)
            answer.add(token)
        return None


class _Answer:
    """One answer on its way."""

    def __init__(self, of: RandomAnswers, matcher: LLMatcher, hints: Sequence[str]) -> None:
        self.tokens: list[int] = []
        self.text = b""
        self._of = of
        self._matcher = matcher
        self._hints = hints
        self._in_string = self._escaped = False
        self._signs: Counter[int] = Counter()  # drawn in this string on the way to its end
        self._planned = b""  # what is still to come of a string's chosen end
        self._drawn = 0  # tokens of this string since its end is looked for

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.text += self._of._pieces[token]
        for byte in self._of._pieces[token]:
            if self._escaped:
                self._escaped = False
            elif self._in_string and byte == ord("\\"):
                self._escaped = True
            elif byte == ord('"'):
                self._in_string = not self._in_string
                self._signs.clear()
                self._drawn = 0

    def next(self, allowed: np.ndarray) -> int:
        """Return an allowed token."""
        if self._planned:
            return self._next_planned(allowed)
        if len(self.tokens) < LONG_TOKENS and self._of._draw.random() >= HURRIES:
            return self._any(allowed)
        if allowed[self._of._eos]:
            return self._of._eos
        if not self._in_string:
            short = next((token for token in self._of._structure if allowed[token]), None)
            return self._any(allowed) if short is None else short
        return self._towards_the_end_of_a_string(allowed)

    def _any(self, allowed: np.ndarray) -> int:
        return int(self._of._draw.choice(np.flatnonzero(allowed)))

    def _towards_the_end_of_a_string(self, allowed: np.ndarray) -> int:
        if allowed[self._of._quote] and not self._escaped:
            return self._of._quote
        if len(self.tokens) >= LONG_TOKENS:
            # Not at each token, for it costs much, but again: half an escape or character has no way out.
            self._planned = self._way_out() if self._drawn % SEARCHES == 0 else b""
            self._drawn += 1
            if self._planned:
                return self._next_planned(allowed)
        signs = [token for token in self._of._signs if allowed[token]]
        if not signs or self._of._draw.random() < 0.5:
            return self._any(allowed)
        # A pattern's parts are mostly held apart by a sign: none is left untried.
        sign = min(signs, key=self._signs.__getitem__)
        self._signs[sign] += 1
        return sign

    def _way_out(self) -> bytes:
        """Return the shortest end of an example that finishes this string, nothing if none does."""
        ends = {hint[start:] for hint in self._hints for start in range(len(hint))}
        for end in sorted(ends, key=lambda end: (len(end), end)):
            if end.isascii() and end.isprintable() and '"' not in end and "\\" not in end:
                whole = f'{end}"'.encode()
                tokens = [self._of._token[bytes([byte])] for byte in whole]
                if self._matcher.validate_tokens(tokens) == len(tokens):
                    return whole
        return b""

    def _next_planned(self, allowed: np.ndarray) -> int:
        """Return the longest allowed piece of the plan: of forced text, a mask holds one spelling."""
        fitting = [
            token for token in np.flatnonzero(allowed) if self._planned.startswith(self._of._pieces[token])
        ]
        token = max(fitting, key=lambda token: len(self._of._pieces[token]))
        self._planned = self._planned[len(self._of._pieces[token]) :]
        return int(token)
