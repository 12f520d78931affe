"""Which blocks a sequence may take over from others, and which of its own it may offer them.

Owns: the reading of a sequence's tokens as a chain of named blocks.
Must not know: policy, slots, steps beyond their rows. Standard library only.
Invariant: what is offered is known tokens only, in whole blocks, each content once; a step that was planned
runs, or everything starts over; the last token of a sequence is never looked up, since without computing it
there would be no logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from container.engine.blocks import BlockPool, Published
from container.engine.prefix import block_bytes, extend
from container.engine.sequence import Sequence

WORTH_WAITING: Final = (
    2  # half of what a sequence would compute itself; a common preamble is not worth a step
)


class PrefixCache:
    """Reads and names blocks of `pool`; changes none. Not `enabled`: nothing is ever shared."""

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self._pool = pool
        self._enabled = enabled
        self._coming: set[bytes] = set()  # keys of what steps under way complete

    def may_hit(self, sequence: Sequence) -> bool:
        """Return whether the sequence may take over blocks at all."""
        return self._enabled and not sequence.wants_prompt_logprobs

    def hit_blocks(self, sequence: Sequence) -> int:
        """The most blocks it may take: the last token must be computed, else there are no logits."""
        return (sequence.total - 1) // self._pool.block_tokens

    def find(self, sequence: Sequence) -> list[int]:
        """Return the published blocks that hold the sequence's first tokens."""
        hits: list[int] = []
        if not self.may_hit(sequence):
            return hits
        for index in range(self.hit_blocks(sequence)):
            block = self._pool.find(self._content(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def coming(
        self, sequence: Sequence, hits: int, running: Iterable[Sequence]
    ) -> tuple[Sequence, int] | None:
        """Return who computes more of the sequence's first tokens than the `hits` blocks found, and how many.

        None where nobody among `running` is about to, or where too little would be saved.
        """
        size = self._pool.block_tokens
        most, provider = hits, None
        if not self.may_hit(sequence):
            return None
        for other in running:
            computing = other.known - other.confirmed > 1
            if computing and other.root == sequence.root and other.confirmed // size <= hits:
                shared = self._shared(sequence, other, hits)
                if shared > most:
                    most, provider = shared, other
        if provider is None or (most - hits) * size * WORTH_WAITING < sequence.total - hits * size:
            return None
        return provider, most * size

    def _shared(self, sequence: Sequence, other: Sequence, known: int) -> int:
        """Return how many of the blocks that `sequence` may take are the same in `other`, beyond `known`."""
        blocks = min(self.hit_blocks(sequence), other.known // self._pool.block_tokens)
        for each in (sequence, other):
            extend(each.keys, each.root, each.history, self._pool.block_tokens, blocks)
        shared = known
        while shared < blocks and sequence.keys[shared] == other.keys[shared]:
            shared += 1
        return shared

    def completed(self, rows: Iterable[tuple[Sequence, int]]) -> list[tuple[Sequence, int, Published]]:
        """Return the blocks these rows complete, each content once, without what is published already.

        Blocks that accepted drafts completed come with the sequence's next row, and so do those whose last
        token is not known yet. What is returned counts as coming until `landed`.
        """
        complete: dict[bytes, tuple[Sequence, int, Published]] = {}
        if not self._enabled:
            return []
        size = self._pool.block_tokens
        for sequence, count in rows:
            full = min(sequence.computed + count, sequence.known) // size
            for index in range(sequence.offered, full):
                content = self._content(sequence, index)
                if not (self._pool.knows(content.key) or content.key in self._coming):
                    complete.setdefault(content.key, (sequence, index, content))
            sequence.offered = max(sequence.offered, full)
        self._coming.update(complete)
        return list(complete.values())

    def landed(self, keys: Iterable[bytes]) -> None:
        """The step that completed `keys` has ended."""
        self._coming.difference_update(keys)

    def reset(self) -> None:
        """No step is under way."""
        self._coming.clear()

    def _content(self, sequence: Sequence, index: int) -> Published:
        size = self._pool.block_tokens
        extend(sequence.keys, sequence.root, sequence.history, size, index + 1)
        tokens = block_bytes(sequence.history, size, index)
        return Published(sequence.keys[index], sequence.root, index, tokens)
