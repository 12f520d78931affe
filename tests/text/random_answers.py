"""Answers a model without any sense would give: random tokens under the mask of a grammar.

Owns: the sampler. Must not know: schemas, what the answers are compared with.
Invariant: the mask alone decides what is allowed; of that, any token may be drawn. A model's own logits only
make the draw likelier to be sensible, so that a hole in a mask shows here first.
"""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

LONG_TOKENS = 60  # from here on the sampler takes what ends a value soonest, where that is allowed
MOST_TOKENS = 1200
CLOSES = (b"}", b"]", b'"', b'"}', b'"]', b'"},', b"0", b"e", b"l")  # also ends of `true` and `null`


class RandomAnswers:
    """Draws whole answers for JSON schemas over one tokenizer."""

    def __init__(self, tokenizer: str, eos: int, seed: int) -> None:
        self._tokenizer = LLTokenizer(tokenizer, eos_token=[eos])
        self._limits = LLParserLimits(verbose_errors=False)
        self._eos = eos
        self._draw = np.random.default_rng(seed)
        pieces = [self._tokenizer.decode_bytes([token]) for token in range(self._tokenizer.vocab_size)]
        self._closing = np.array([piece in CLOSES for piece in pieces])
        self._bytes = pieces

    def one(self, schema: str) -> bytes | None:
        """Return a finished answer, None when MOST_TOKENS were not enough for one."""
        grammar = LLMatcher.grammar_from_json_schema(schema)
        matcher = LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
        tokens: list[int] = []
        while len(tokens) < MOST_TOKENS:
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            assert not matcher.is_error(), "a grammar that was accepted cannot be followed"
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            assert len(allowed), "nothing may be drawn, not even the end"
            token = self._drawn(allowed, len(tokens))
            if token == self._eos:
                assert matcher.is_accepting()
                return b"".join(self._bytes[token] for token in tokens)
            assert matcher.consume_token(token)
            tokens.append(token)
        return None

    def _drawn(self, allowed: np.ndarray, length: int) -> int:
        hurried = length >= LONG_TOKENS or self._draw.random() < 0.15
        if hurried:
            closing = allowed[self._closing[allowed]]
            if self._eos in allowed:
                return self._eos
            if len(closing):
                return int(self._draw.choice(closing))
        return int(self._draw.choice(allowed))
