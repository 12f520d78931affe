"""An accepted request that has not ended.

Owns: its unfinished choices, and how the finished ones went. Must not know: who ends it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from container.engine.grammar import Compilation
from container.engine.sequence import Sequence


@dataclass(slots=True)
class Live:
    """A request between `submit` and its last final delta."""

    open: list[Sequence] = field(default_factory=list)
    compilation: Compilation | None = None  # held until the request ends
    failed: bool = False
    cancelled: bool = False
