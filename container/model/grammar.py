"""Compiled grammars: built in the background, kept within bounds, handed out as matchers.

Owns: llguidance's tokenizer and limits, the cache of compiled grammars, the thread that compiles.
Must not know: slots, logits, requests. Never imports `llguidance.hf` or `llguidance.torch`.
Invariant: llguidance never raises on a grammar, so every matcher is asked for its error before it is used; no
error text leaves this file, because it quotes the grammar.

A compiled grammar is a matcher in its first state. Matchers copied from it share its lexer, whose states are
added as they are met: a copy takes 3 us and 4 kB, and starts with what the others have learned.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from container.engine.grammar import GrammarState
from container.engine.request import Grammar, GrammarKind
from container.model.source import ModelSource

TOKENIZER_FILE: Final = "tokenizer.json"
# Not `verbose_errors`: they quote the grammar. The rest are llguidance's defaults, but for the states of a
# lexer (1-2 kB each; 250,000) and the items of one mask (50,000), which bound what others have to wait for.
PARSER_LIMITS: Final[Mapping[str, int | bool]] = MappingProxyType(
    {
        "max_items_in_row": 2_000,
        "initial_lexer_fuel": 1_000_000,
        "step_lexer_fuel": 200_000,
        "step_max_items": 10_000,
        "max_lexer_states": 20_000,
        "max_grammar_size": 500_000,
        "verbose_errors": False,
    }
)
CACHED_GRAMMARS: Final = 128
CACHED_BYTES: Final = 256 * 2**20
# What a compiled grammar may come to hold, from its text. Measured with 49,152 tokens: 0.1-0.7 MB for usual
# schemas after hundreds of tokens, 12.5 MB for 3,000 properties in 80 kB, 4 MB for `.*a.{2000}`.
GRAMMAR_BYTES: Final = 2**20
BYTES_PER_CHAR: Final = 160
COMPILE_LIMIT_S: Final = 5.0  # the slowest known (3,000 properties) takes 1 s; past this the thread hangs

_log = logging.getLogger("strongroom.grammar")


@dataclass(slots=True, eq=False)
class _Entry:
    """One grammar, by its digest. `matcher` is there when it is READY."""

    grammar: Grammar = field(repr=False)
    bytes: int
    state: GrammarState = GrammarState.COMPILING
    matcher: LLMatcher | None = field(default=None, repr=False)
    holds: int = 0


class Hold:
    """A request's hold on a grammar: what is held is not evicted. Implements engine's Compilation."""

    def __init__(self, cache: GrammarCache, entry: _Entry) -> None:
        self._cache = cache
        self._entry = entry

    @property
    def state(self) -> GrammarState:
        return self._cache.state_of(self._entry)

    def release(self) -> None:
        self._cache.release(self._entry)


class GrammarCache:
    """Implements container.engine.grammar.Grammars; any thread may call anything.

    Building the tokenizer begins at once, in a thread: 0.5 s for 49,152 tokens, 8.5 s for 262,144. Whether it
    could be built `available` says.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        eos_token_ids: Sequence[int],
        *,
        grammars: int = CACHED_GRAMMARS,
        cached_bytes: int = CACHED_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grammars = grammars
        self._cached_bytes = cached_bytes
        self._clock = clock
        self._limits = LLParserLimits(**PARSER_LIMITS)  # type: ignore[arg-type]
        self._tokenizer: LLTokenizer | None = None
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._queue: list[_Entry] = []  # to be compiled, oldest first
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._busy_since_s: float | None = None
        self._closed = False
        self._start = threading.Thread(
            target=self._build_tokenizer,
            args=(tokenizer_json, list(eos_token_ids)),
            name="grammar-tokenizer",
            daemon=True,
        )
        self._start.start()

    # The tokenizer

    def _build_tokenizer(self, raw: bytes, eos: list[int]) -> None:
        try:
            text = raw.decode()
            if not text.lstrip().startswith("{"):
                raise ValueError("not a JSON object")  # llguidance takes any other text for a file's name
            self._tokenizer = LLTokenizer(text, eos_token=eos)
        except ValueError as error:
            _log.warning("no structured output: the tokenizer is not usable (%s)", type(error).__name__)

    @property
    def available(self) -> bool:
        """True when sampling can be held to grammars. Waits until the tokenizer is built."""
        self._start.join()
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> LLTokenizer:
        self._start.join()
        assert self._tokenizer is not None, "grammars are used only where they are available"
        return self._tokenizer

    # What the engine asks

    def prepare(self, grammar: Grammar) -> Hold:
        """Return a hold on `grammar`, which is compiled in the background unless it is known."""
        key = _digest(grammar)
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                size = GRAMMAR_BYTES + BYTES_PER_CHAR * len(grammar.text)
                entry = self._entries[key] = _Entry(grammar, size)
                self._queue.append(entry)
                self._wake()
            self._entries.move_to_end(key)
            entry.holds += 1
        return Hold(self, entry)

    def state_of(self, entry: _Entry) -> GrammarState:
        """Return how far `entry` is; all that wait have failed once the compiling thread is overdue."""
        since_s = self._busy_since_s
        overdue = since_s is not None and self._clock() - since_s > COMPILE_LIMIT_S
        return GrammarState.FAILED if overdue and entry.state is GrammarState.COMPILING else entry.state

    def release(self, entry: _Entry) -> None:
        """Take back one hold."""
        with self._changed:
            entry.holds -= 1
            assert entry.holds >= 0, "a hold is released twice"
            if entry.holds == 0 and entry.state is not GrammarState.READY:
                self._forget(entry)  # nobody waits, or it failed: asked again, it is tried again
            self._evict()
            self._changed.notify_all()

    # What the sampler asks

    def matcher(self, grammar: Grammar, *, fresh: bool = False) -> LLMatcher | None:
        """Return a matcher of its own in the first state, or None when the grammar fails.

        `fresh` compiles it anew and replaces what was kept, because a shared lexer may be full.
        """
        key = _digest(grammar)
        with self._changed:
            entry = self._entries.get(key)
            known = entry.matcher if entry is not None and not fresh else None
        if known is None:
            known = self._compile(grammar)
            if known is None:
                return None
            with self._changed:
                if entry is not None and entry.state is GrammarState.READY:
                    entry.matcher = known
        return known.deep_copy()

    def close(self) -> None:
        """Let go of all grammars and end the thread; a hold may still be released."""
        with self._changed:
            self._closed = True
            self._entries.clear()
            self._queue.clear()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise AssertionError unless the bounds hold; for tests."""
        with self._changed:
            ready = [entry for entry in self._entries.values() if entry.matcher is not None]
            assert len(ready) <= self._grammars, "more grammars are kept than allowed"
            assert len(ready) <= 1 or sum(entry.bytes for entry in ready) <= self._cached_bytes
            assert all(entry.holds or entry.matcher for entry in self._entries.values()), "kept for nobody"

    # Inside; `_changed` is held but in `_work` and `_compile`

    def _wake(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="grammar-compiler", daemon=True)
            self._worker.start()
        self._changed.notify_all()

    def _forget(self, entry: _Entry) -> None:
        for key, kept in list(self._entries.items()):
            if kept is entry:
                del self._entries[key]
        if entry in self._queue:
            self._queue.remove(entry)
        entry.matcher = None

    def _evict(self, room_for: int = 0) -> bool:
        """Drop what nobody holds, longest unused first, until the bounds hold; False when they do not."""
        ready = [entry for entry in self._entries.values() if entry.matcher is not None]
        count, size = len(ready) + bool(room_for), sum(entry.bytes for entry in ready) + room_for
        for entry in ready:
            if count <= self._grammars and size <= self._cached_bytes:
                break
            if entry.holds == 0:
                self._forget(entry)
                count, size = count - 1, size - entry.bytes
        return count <= 1 or (count <= self._grammars and size <= self._cached_bytes)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (self._queue and self._evict(self._queue[0].bytes)):
                    self._changed.wait()
                if self._closed:
                    return
                entry = self._queue.pop(0)
                self._busy_since_s = self._clock()
            matcher = self._compile(entry.grammar)
            with self._changed:
                self._busy_since_s = None
                entry.matcher = matcher if entry.holds else None
                entry.state = GrammarState.FAILED if matcher is None else GrammarState.READY

    def _compile(self, grammar: Grammar) -> LLMatcher | None:
        """Return a matcher that has made its first mask, or None; releases the GIL while it builds."""
        if not self.available:
            return None
        try:
            matcher = LLMatcher(self.tokenizer, _source(grammar), log_level=0, limits=self._limits)
        except ValueError:  # a schema that is not JSON, which is found before the matcher is made
            return None
        if matcher.is_error():
            return None
        words = np.empty(-(-self.tokenizer.vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return None if matcher.is_error() else matcher


def over(source: ModelSource, eos_token_ids: Sequence[int] | None = None) -> GrammarCache | None:
    """Return the grammars of the model in `source`, or None without a `tokenizer.json` or an end of sequence.

    Without `eos_token_ids` they are those of the model's configuration. Raises LoadError and SourceError, as
    loading the model does.
    """
    raw = source.file(TOKENIZER_FILE)
    eos = _configured_ends(source) if eos_token_ids is None else eos_token_ids
    return GrammarCache(raw, eos) if raw is not None and eos else None


def _configured_ends(source: ModelSource) -> Sequence[int]:
    # imported where they are needed: by themselves they take longer than a ready decoder to load
    import torch

    from container.model.load import end_of_sequence, read_config
    from container.model.quantize_checkpoint import full_precision

    return end_of_sequence(source, read_config(full_precision(source, torch.float32)))


def _digest(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind.value}\n{grammar.text}".encode()).digest()


def _source(grammar: Grammar) -> str:
    """Return the grammar in llguidance's own form; raises ValueError on a schema that is not JSON."""
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(grammar.text)
    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)
