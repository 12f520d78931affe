"""Why a grammar is refused: a closed list of reasons.

Owns: the reasons. Must not know: schemas, regular expressions, how they are compiled, HTTP.
Invariant: an error holds a reason and at most the name of a keyword; nothing of the grammar itself.

    GrammarError
    |- carries one GrammarReason
"""

from __future__ import annotations

import enum


class GrammarReason(enum.StrEnum):
    """Closed list. The first group is found by reading the grammar, the second by building it."""

    NOT_A_SCHEMA = "not_a_schema"  # JSON Schema's own rules are broken
    UNSUPPORTED_KEYWORD = "unsupported_keyword"  # known, asks for something, cannot be followed
    UNKNOWN_KEYWORD = "unknown_keyword"
    REFERENCE = "reference"  # `$ref` to outside the schema or to nothing
    TOO_LARGE = "too_large"  # over a bound on size, depth or counts
    REGEX_FEATURE = "regex_feature"  # look-around, back-references
    INVALID_REGEX = "invalid_regex"

    UNSATISFIABLE = "unsatisfiable"  # no finished text can follow it
    NOT_COMPILED = "not_compiled"  # the grammar library refused it for a reason not listed here
    TIME = "time"  # not built within the deadline
    RESOURCES = "resources"  # the process that built it died: memory, stack, a fault of the library
    TOO_COMPLEX = "too_complex"  # over the library's own bounds, or slow to follow

    BUSY = "busy"  # no process is free to look at it; try again
    UNAVAILABLE = "unavailable"  # the library cannot read this model's tokenizer


class GrammarError(Exception):
    """A grammar that is not followed; `keyword` names the part at fault where that is known."""

    def __init__(self, reason: GrammarReason, keyword: str | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.keyword = keyword
