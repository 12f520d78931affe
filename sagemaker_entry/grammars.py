"""Grammars of requests: checked before the engine hears of them, judged once the answer is there.

Owns: when a grammar is served, what each reason is called to a client, what is counted.
Must not know: dialects' fields, how grammars are built, the engine.
Invariant: an answer that ended by itself is passed on only after it was shown to follow its grammar; one cut
by `max_tokens` may be incomplete, and its finish reason says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from container.engine.request import Grammar, GrammarKind
from container.text.grammar_errors import GrammarError, GrammarReason
from container.text.schema import ANNOTATIONS, FOLLOWED, UNSUPPORTED
from sagemaker_entry import log
from sagemaker_entry.dialects.fields import printable
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import Metrics

BUSY_RETRY_S: Final = 1
LOADING_RETRY_S: Final = 5
# A grammar in Lark is the server's own: it may name tokens that leave no text, and has its own reader.
JUDGED: Final = frozenset({GrammarKind.JSON_SCHEMA, GrammarKind.REGEX})
WORDS: Final = {
    GrammarReason.NOT_A_SCHEMA: "it breaks the rules of JSON Schema",
    GrammarReason.UNSUPPORTED_KEYWORD: "a keyword of it is not supported",
    GrammarReason.UNKNOWN_KEYWORD: "a keyword of it is not known",
    GrammarReason.REFERENCE: "it refers to something outside itself or to nothing",
    GrammarReason.TOO_LARGE: "it is too large",
    GrammarReason.REGEX_FEATURE: "look-around and back-references are not supported",
    GrammarReason.INVALID_REGEX: "it holds an invalid regular expression",
    GrammarReason.UNSATISFIABLE: "no finished text can follow it",
    GrammarReason.NOT_COMPILED: "it cannot be compiled",
    GrammarReason.TIME: "it takes too long to compile",
    GrammarReason.RESOURCES: "it takes too much memory to compile",
    GrammarReason.TOO_COMPLEX: "it is too complex",
}
_KEYWORDS: Final = ANNOTATIONS | FOLLOWED | UNSUPPORTED


class Checking(Protocol):
    """What of GrammarChecker is used here."""

    def start(self) -> None: ...

    def check(self, kind: str, text: str) -> None: ...

    def holds(self, kind: str, text: str, answer: str) -> bool: ...


class Grammars:
    """One per worker; `ready` gives it the checker once the tokenizer is known."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._checker: Checking | None = None

    def ready(self, checker: Checking) -> None:
        self._checker = checker

    def start(self) -> None:
        """Start the checker ahead of its first use; raises GrammarError."""
        if self._checker is not None:
            self._checker.start()

    def check(self, grammar: Grammar, field: str, *, served: bool) -> None:
        """Raise ApiError when the grammar cannot be followed; `served` is what the engine says it can do."""
        if not served:
            raise ApiError(Code.GRAMMAR_OFF, param=field)
        if self._checker is None:
            raise ApiError(Code.LOADING, retry_after_s=LOADING_RETRY_S)
        try:
            self._checker.check(grammar.kind.value, grammar.text)
        except GrammarError as error:
            refusal = grammar_refused(error, field)
        else:
            return
        raise refusal

    def judge(self, grammar: Grammar) -> Callable[[str], None] | None:
        """Return what raises ApiError for a finished answer that does not follow `grammar`."""
        checker = self._checker
        if checker is None or grammar.kind not in JUDGED:
            return None

        def judge(answer: str) -> None:
            try:
                counted = None if checker.holds(grammar.kind.value, grammar.text, answer) else "violations"
            except GrammarError:
                counted = "unjudged"
            if counted is not None:
                self._metrics.add(f"strongroom_grammar_{counted}_total")
                log.write("error", f"grammar_{counted}", kind=grammar.kind.value)
                raise ApiError(Code.GRAMMAR_VIOLATED)

        return judge


def grammar_refused(error: GrammarError, field: str) -> ApiError:
    """Return the client's error for a refused grammar that came in `field`."""
    if error.reason is GrammarReason.BUSY:
        return ApiError(Code.OVERLOADED, retry_after_s=BUSY_RETRY_S)
    if error.reason is GrammarReason.UNAVAILABLE:
        return ApiError(Code.GRAMMAR_OFF, param=field)
    reason = WORDS[error.reason]
    if error.keyword is not None:
        shown = error.keyword if error.keyword in _KEYWORDS else printable(error.keyword)
        reason = f"`{shown}`: {reason}"
    return ApiError(Code.GRAMMAR_INVALID, param=field, reason=reason)
