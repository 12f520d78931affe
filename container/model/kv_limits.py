"""What keys and values of sequences are bounded by, and what a layer stores of each token.

Owns: the bounds, the error when they are passed. Must not know: where keys and values lie.
"""

from __future__ import annotations

from dataclasses import dataclass


class KVBudgetExceeded(MemoryError):
    """Running sequences together hold more tokens than the slabs were sized for."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores per token, and how many of the latest tokens its queries see (None: all)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def elements(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class KVLimits:
    """What the cache may hold; `resident_tokens` None means that slots x sequence_tokens is affordable.

    `step_tokens` bounds how much one step adds to a sequence; None: a step may be a whole sequence.
    `draft_tokens` bounds what `truncate` takes back.
    """

    slots: int
    sequence_tokens: int
    block_tokens: int
    blocks: int
    resident_tokens: int | None = None
    step_tokens: int | None = None
    draft_tokens: int = 0

    def held_tokens(self, window: int | None) -> int:
        """Return the most positions, in whole blocks, that a layer of `window` keeps of one sequence."""
        longest = self._whole(self.sequence_tokens)
        if window is None or self.step_tokens is None:
            return longest
        # A query sees `window` positions, its own among them; the first draft taken back is where it now is.
        seen = window + max(0, self.draft_tokens - 1)
        saved = max(self.step_tokens + self.block_tokens - 1, 2 * self.draft_tokens + self.block_tokens)
        return min(longest, self._whole(max(seen, saved)))

    def _whole(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens) * self.block_tokens
