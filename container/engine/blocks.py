"""The pool of KV blocks: who owns which, what may be shared, what goes first when room is needed.

Owns: block states, reference counts, the free list, the index of published blocks and its LRU order.
Must not know: sequences, policy, keys' derivation, where the bytes lie. Standard library only.
Invariant: every block but block 0 is in exactly one state; `check` states the rest.

    FREE ---allocate---> WRITING ---publish---> SHARED <---acquire/release---> CACHED
     ^                      |                     |  forget                       |
     +-------release--------+                     v                               |
     +-------release---- RETIRED <----------------+                               |
     +----------------------------evict (least recently used)---------------------+

A step is planned, run and committed before the next is planned, so no block is freed while a step that writes
it is in flight, and a quarantine between freed and FREE would always be empty.
Block 0 is never handed out: runners that pad a batch write its rows there.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

RESERVED_BLOCK = 0


class BlockState(enum.Enum):
    """What may be done with a block."""

    FREE = "free"  # nobody's
    WRITING = "writing"  # one owner, who may write it
    SHARED = "shared"  # published, read-only, at least one reader
    CACHED = "cached"  # published, no reader, may be evicted
    RETIRED = "retired"  # was published and is not to be found again; readers may finish


class PoolError(AssertionError):
    """A block was used against its state: a fault of ours."""


@dataclass(frozen=True, slots=True)
class Published:
    """What a published block holds, kept to compare on every hit: the key alone is not trusted."""

    key: bytes = field(repr=False)
    root: bytes = field(repr=False)  # tenant, client salt and model
    index: int  # place in the sequence; keys and values depend on the position
    tokens: bytes = field(repr=False)


class BlockPool:
    """Blocks 1..`blocks`, all operations O(1) per block. Raises ValueError on sizes below one."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        if blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool needs blocks of tokens, got {blocks} of {block_tokens}")
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.reset()

    def reset(self) -> None:
        """Make every block FREE and forget everything published."""
        self._state = [BlockState.FREE] * (self.blocks + 1)
        self._readers = [0] * (self.blocks + 1)
        self._published: list[Published | None] = [None] * (self.blocks + 1)
        self._free = list(range(self.blocks, RESERVED_BLOCK, -1))  # a stack, lowest id on top
        self._index: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out one after another."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.blocks - self.available

    def state(self, block: int) -> BlockState:
        return self._state[block]

    def count_cached(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` are CACHED, and so stop being available once acquired."""
        return sum(self._state[block] is BlockState.CACHED for block in blocks)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that `tokens` tokens take."""
        return -(-tokens // self.block_tokens)

    def allocate(self) -> int:
        """Return a block to write, evicting the least recently used cached one if none is free.

        Raises PoolError when there is neither; ask `available` first.
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        else:
            raise PoolError("a block was asked for and none is available")
        self._state[block] = BlockState.WRITING
        self._readers[block] = 1
        return block

    def find(self, wanted: Published) -> int | None:
        """Return the block that holds exactly `wanted`, or None."""
        block = self._index.get(wanted.key)
        # Equal keys of unequal content are a hash collision, or an attack: a miss either way.
        return block if block is not None and self._published[block] == wanted else None

    def knows(self, key: bytes) -> bool:
        """Return True when a block is published under `key`, whatever it holds."""
        return key in self._index

    def acquire(self, block: int) -> None:
        """Read a published block."""
        if self._state[block] is BlockState.CACHED:
            del self._cached[block]
            self._state[block] = BlockState.SHARED
        elif self._state[block] is not BlockState.SHARED:
            raise PoolError(f"a {self._state[block].value} block cannot be read by another sequence")
        self._readers[block] += 1

    def publish(self, block: int, content: Published) -> None:
        """Make a fully written block read-only and let others find it. The key must not be taken."""
        if self._state[block] is not BlockState.WRITING:
            raise PoolError(f"a {self._state[block].value} block cannot be published")
        if content.key in self._index:
            raise PoolError("two blocks cannot be published under one key")
        self._state[block] = BlockState.SHARED
        self._published[block] = content
        self._index[content.key] = block

    def forget(self, block: int) -> None:
        """Let nobody find a block in use again: its content is in doubt. Private blocks stay as they are."""
        if self._state[block] is BlockState.SHARED:
            self._unpublish(block)
            self._state[block] = BlockState.RETIRED

    def release(self, table: Sequence[int]) -> None:
        """Give back a sequence's blocks, last first: the tail of a chain is evicted before its head."""
        for block in reversed(table):
            if self._readers[block] < 1:
                raise PoolError(f"a {self._state[block].value} block was released twice")
            self._readers[block] -= 1
            if self._readers[block]:
                continue
            if self._state[block] is BlockState.SHARED:
                self._state[block] = BlockState.CACHED
                self._cached[block] = None
            else:
                self._state[block] = BlockState.FREE
                self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise PoolError unless every statement about the pool holds; `tables` are all that hold blocks."""
        readers: Counter[int] = Counter()
        for table in tables:
            readers.update(table)
        states = Counter(self._state[1:])
        self._require(sum(states.values()) == self.blocks, "states do not sum to the pool")
        self._require(states[BlockState.FREE] == len(self._free), "free list and states disagree")
        self._require(len(set(self._free)) == len(self._free), "a block is free twice")
        self._require(states[BlockState.CACHED] == len(self._cached), "LRU and states disagree")
        self._require(self._state[0] is BlockState.FREE, "block 0 was handed out")
        self._require(RESERVED_BLOCK not in readers, "block 0 is in a table")
        self._require(RESERVED_BLOCK not in self._free, "block 0 is in the free list")
        for block in range(1, self.blocks + 1):
            self._check_block(block, readers[block])
        for key, block in self._index.items():
            content = self._published[block]
            self._require(content is not None and content.key == key, "the index names another block")

    def _check_block(self, block: int, readers: int) -> None:
        state = self._state[block]
        held = state in (BlockState.WRITING, BlockState.SHARED, BlockState.RETIRED)
        published = state in (BlockState.SHARED, BlockState.CACHED)
        content = self._published[block]
        self._require(readers == self._readers[block], "reference count and tables disagree")
        self._require(held == (readers > 0), f"a {state.value} block has {readers} readers")
        self._require(state is not BlockState.WRITING or readers == 1, "a block has two writers")
        self._require(published == (content is not None), f"a {state.value} block and its content disagree")
        if content is not None:
            self._require(self._index.get(content.key) == block, "a published block cannot be found")
        if state is BlockState.CACHED:
            self._require(block in self._cached, "a cached block cannot be evicted")

    def _unpublish(self, block: int) -> None:
        content = self._published[block]
        assert content is not None, "a published block has content"
        del self._index[content.key]
        self._published[block] = None

    @staticmethod
    def _require(holds: bool, sentence: str) -> None:
        if not holds:
            raise PoolError(sentence)
