"""How large a regular expression is once its counted repetitions are written out.

Owns: that count and its bound. Must not know: what the expression matches, JSON, the grammar library.
Invariant: the count is made in one pass over the text, before any native code sees it.

    (ab{10}c){100}  ->  (1 + 10 + 1) * 100 = 1,200
"""

from __future__ import annotations

import re
from typing import Final

from container.text.grammar_errors import GrammarError, GrammarReason

MAX_REGEX_CHARS: Final = 8192
MAX_EXPANDED: Final = 65_536  # a longer answer than this is cut by the window of most models anyway
MAX_GROUP_DEPTH: Final = 64  # parsers recurse once per group

_COUNT: Final = re.compile(r"\{\s*(\d{1,7})\s*(,?)\s*(\d{0,7})\s*\}")
_ESCAPE: Final = re.compile(r"\\(?:[pPxuU]\{[^}]*\}|.)", re.DOTALL)


def check_regex(pattern: str) -> None:
    """Raise GrammarError(TOO_LARGE) when `pattern` exceeds a bound; says nothing about its syntax."""
    if len(pattern) > MAX_REGEX_CHARS or _expanded(pattern) > MAX_EXPANDED:
        raise GrammarError(GrammarReason.TOO_LARGE)


def _expanded(pattern: str) -> int:
    outer: list[int] = []
    total = atom = at = 0
    while at < len(pattern):
        sign = pattern[at]
        count = _COUNT.match(pattern, at) if sign == "{" else None
        if count is not None:
            times = max(1, int(count[1]), int(count[3] or 0))
            total, atom, at = total + atom * (times - 1), atom * times, count.end()
            continue
        if sign == "(":
            outer.append(total)
            total = atom = 0
            if len(outer) > MAX_GROUP_DEPTH:
                raise GrammarError(GrammarReason.TOO_LARGE)
        elif sign == ")" and outer:
            atom = max(1, total)
            total = outer.pop() + atom
        elif sign not in "*+?|":
            atom = 1
            total += 1
        at = _after(pattern, at)
    return total


def _after(pattern: str, at: int) -> int:
    """Return where the next sign begins: past an escape or a character class as a whole."""
    if pattern[at] == "\\":
        escape = _ESCAPE.match(pattern, at)
        return escape.end() if escape is not None else at + 1
    if pattern[at] != "[":
        return at + 1
    depth, at = 1, at + 1
    at += pattern.startswith("^", at)
    at += pattern.startswith("]", at)  # a bracket that comes first stands for itself
    while at < len(pattern) and depth:
        if pattern[at] == "\\":
            at += 1
        else:
            depth += (pattern[at] == "[") - (pattern[at] == "]")
        at += 1
    return at
