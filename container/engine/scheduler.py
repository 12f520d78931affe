"""Who computes how many tokens in the next step.

Owns: running sequences, slots, the order of relief when blocks are short, siblings that wait for a prompt.
Must not know: what a token means, stop rules, clients, time. Standard library only.
Invariant: nothing else moves a sequence or touches its blocks; between steps a running sequence holds exactly
the blocks of its computed tokens, and all together compute at most `resident_tokens`.

One token budget, no phases: a sequence has `computed` and `total` tokens and a step closes part of the gap.
Decoding, chunked prefill, prefix hits and recomputing after preemption are all that one thing.

Progress: the oldest running sequence is never a victim and every step has a token for it, so with nothing
but it changing it ends within `limit_tokens` steps. Starvation bound: a sequence is admitted at the latest
after as many steps as the sequences admitted before it declared tokens (`tenants` bounds which those are).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Final

from container.engine.blocks import BlockPool, Published
from container.engine.planning import Draft, Step, build
from container.engine.prefix import block_bytes, extend
from container.engine.sequence import Sequence, State
from container.engine.step import Capacity
from container.engine.tenants import TenantQueues

PINNED_AFTER: Final = 3  # preemptions; a fourth would recompute more than it frees
WATERMARK_SHARE: Final = 100  # one block in so many stays free on admission, for decodes to grow into
WATERMARK_SEQUENCES: Final = 8  # and one block per so many running sequences, whichever is more
UNLIMITED_TOKENS: Final = 1 << 62  # `resident_tokens` None, without a second kind of arithmetic

_arrival = attrgetter("serial")


class Scheduler:
    """Turns sequences into steps. `plan`, run it, then `commit` it (or `reset` after a failure)."""

    def __init__(self, capacity: Capacity, running_limit: int) -> None:
        self._capacity = capacity
        self._limit = running_limit
        resident = capacity.resident_tokens
        self._resident_limit = UNLIMITED_TOKENS if resident is None else resident
        self.pool = BlockPool(capacity.blocks, capacity.block_tokens)
        self.queue = TenantQueues(capacity.step_tokens)
        self.running: list[Sequence] = []  # oldest first
        self.forget_counts()
        self._held: dict[Sequence, list[Sequence]] = {}  # first choice: its siblings
        self._slots = list(range(running_limit))  # a heap: the lowest free slot is taken first
        self._released: list[int] = []  # slots the runner has not been told to free
        self._exhausted: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """Sequences that have been accepted and do not run."""
        return len(self.queue) + sum(map(len, self._held.values()))

    @property
    def full(self) -> bool:
        """True when a newcomer would wait: no slot is free, or others wait for tokens or blocks."""
        return len(self.running) == self._limit or len(self.queue) > 0

    # Arrivals and departures

    def add(self, choices: list[Sequence]) -> None:
        """Queue the choices of one request, all NEW or all ASIDE.

        Siblings step aside until the first choice's prompt is in the prefix cache, where that helps.
        """
        first, *siblings = choices
        aside = self._may_hit(first) and self._hit_blocks(first) > 0
        self._enqueue(first)
        if not aside:
            for sibling in siblings:
                self._enqueue(sibling)
        elif siblings:
            for sibling in siblings:
                sibling.move(State.HELD)
            self._held[first] = siblings

    def remove(self, sequence: Sequence) -> None:
        """Finish a sequence in whatever state it is and free what it holds."""
        if sequence.state is State.RUNNING:
            self._unseat(sequence)
        elif sequence.state is State.HELD:
            for siblings in self._held.values():
                if sequence in siblings:
                    siblings.remove(sequence)
        elif sequence.state is not State.FINISHED:
            self.queue.discard(sequence)
        sequence.move(State.FINISHED)
        self.queue.refund(sequence)
        self._release_siblings(sequence)

    def forget_counts(self) -> None:
        """Count preemptions and prefix hits from zero."""
        self.preemptions = self.hit_tokens = self.queried_tokens = 0

    def reset(self) -> None:
        """After a failed step, when the runner has forgotten everything: all that still run start over.

        It is not their fault, so it does not count towards pinning.
        """
        for sequence in list(self.running):
            self._unseat(sequence)
            self._enqueue(sequence, State.PREEMPTED)
        self._released.clear()
        self.pool.reset()

    def _enqueue(self, sequence: Sequence, state: State = State.WAITING) -> None:
        sequence.move(state)
        self.queue.push(sequence)

    # One step

    def plan(self, number: int) -> Step | None:
        """Return the next step, or None when nothing can run. Call `take_exhausted` after it."""
        resident_left = self._resident_limit - sum(sequence.computed for sequence in self.running)
        draft = Draft(self._capacity.step_tokens, resident_left)
        self._decode(draft)
        self._prefill(draft)
        self._admit(draft)
        if not draft.rows:
            return None
        step = build(number, draft, self._released, self._published)
        self._released = []
        return step

    def take_exhausted(self) -> list[Sequence]:
        """Return, once, the sequences that ran alone and still could not get room; they are FINISHED."""
        exhausted, self._exhausted = self._exhausted, []
        return exhausted

    def commit(self, step: Step, failed: Collection[Sequence]) -> None:
        """Account for a step that has run; what `failed` ones computed is never shown to others."""
        for sequence in failed:
            for block in sequence.table:
                self.pool.forget(block)
        for sequence, count in step.rows:
            if sequence not in failed:
                sequence.computed += count
        for sequence, index, content in step.publish:
            if sequence not in failed:
                self.pool.publish(sequence.table[index], content)
        for sequence, _ in step.rows:
            if sequence.computed >= sequence.prompt_tokens:
                self._release_siblings(sequence)

    def check(self) -> None:
        """Raise AssertionError unless what this file promises holds; for tests, between steps."""
        self.pool.check(sequence.table for sequence in self.running)
        ages = [sequence.serial for sequence in self.running]
        assert ages == sorted(set(ages)), "running sequences are not in order of arrival"
        seats = [sequence.slot for sequence in self.running]
        assert sorted([*seats, *self._slots]) == list(range(self._limit)), "a slot is lost or taken twice"  # type: ignore[type-var]
        for first in self._held:
            assert first.state is not State.FINISHED, "siblings wait for a choice that has ended"
        held = sum(sequence.computed for sequence in self.running)
        assert held <= self._resident_limit, "running sequences hold more tokens than the runner has room for"
        for sequence in self.running:
            assert sequence.state is State.RUNNING, "a sequence runs that is not RUNNING"
            assert sequence.computed < sequence.total, "a running sequence has nothing to compute"
            assert len(sequence.table) == self.pool.blocks_for(sequence.computed), "blocks and tokens differ"

    # Order of a step

    def _decode(self, draft: Draft) -> None:
        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.state is State.RUNNING and self._reserve(sequence, 1, draft):
                draft.put(sequence, 1)

    def _prefill(self, draft: Draft) -> None:
        partial = [s for s in self.running if s.remaining > 1]
        owed = owed_tokens = 0  # what older prompts still need
        for place, sequence in enumerate(partial):
            if sequence.state is not State.RUNNING:
                continue  # preempted for an older one
            others = place + 1 < len(partial) or len(self.queue) > 0
            count = self._chunk(sequence, draft, others)
            if place == 0:
                # may preempt, for one block or token
                count = self._fit(sequence, count, max(1, self.pool.available), max(1, draft.resident_left))
            else:
                # Prompts that each hold a part of the pool would wait for each other for ever, so the
                # younger ones take only what the older ones do not need.
                tokens = draft.resident_left - owed_tokens
                count = self._fit(sequence, count, self.pool.available - owed, tokens)
            if count > 0 and self._reserve(sequence, count, draft):
                draft.put(sequence, count)
            owed += self._owed(sequence)
            owed_tokens += self._owed_tokens(sequence, draft)

    def _admit(self, draft: Draft) -> None:
        if draft.preempted:
            return  # there was no room for those who ran, so there is none for more
        partial = [s for s in self.running if s.remaining > 1]
        owed = sum(self._owed(s) for s in partial)
        owed_tokens = sum(self._owed_tokens(s, draft) for s in partial)
        while draft.left > 0 and len(self.running) < self._limit:
            sequence = self.queue.head()
            if sequence is None:
                return
            hits = self._find_hits(sequence)
            needed = self.pool.blocks_for(sequence.total + 1) - len(hits)
            supply = self.pool.available - self.pool.count_cached(hits) - owed
            if self.running and supply < needed + self._watermark():
                return
            if self.running and draft.resident_left - owed_tokens < sequence.total + 1 + self._headroom():
                return
            computed = len(hits) * self.pool.block_tokens
            others = len(self.queue) > 1
            count = self._chunk(sequence, draft, others, computed)
            if count == 0:
                return
            self._seat(sequence, hits)
            draft.resident_left -= computed
            if self._reserve(sequence, count, draft):
                draft.put(sequence, count)
                owed += self._owed(sequence)
                owed_tokens += self._owed_tokens(sequence, draft)

    def _chunk(self, sequence: Sequence, draft: Draft, others: bool, computed: int | None = None) -> int:
        """Return how many tokens of a prompt to compute now: half of what is left if `others` wait."""
        computed = sequence.computed if computed is None else computed
        remaining = sequence.total - computed
        if not self._capacity.chunked_prefill:
            # A prompt that cannot be cut may be longer than the budget: it goes when no other prompt has.
            return remaining if remaining <= draft.left or not draft.prefills else 0
        cap = max(draft.left, 0)
        if others:
            cap = max(cap // 2, min(cap, self.pool.block_tokens))
        return self._aligned(computed, remaining, cap)

    def _aligned(self, computed: int, remaining: int, cap: int) -> int:
        """Return at most `cap` tokens, ending on a block unless they end the prompt or are less than one."""
        if remaining <= cap:
            return remaining
        end = (computed + cap) // self.pool.block_tokens * self.pool.block_tokens
        return end - computed if end > computed else cap

    def _fit(self, sequence: Sequence, count: int, blocks: int, tokens: int) -> int:
        """Shrink a chunk to `tokens`, and to what its blocks and `blocks` new ones hold.

        A prompt that cannot be cut never comes here: it is computed whole in the step that admits it.
        """
        room = (len(sequence.table) + max(blocks, 0)) * self.pool.block_tokens - sequence.computed
        return min(count, room, tokens)

    def _owed(self, sequence: Sequence) -> int:
        """Return the blocks a prompt needs until its first token is out."""
        return max(0, self.pool.blocks_for(sequence.total + 1) - len(sequence.table))

    def _owed_tokens(self, sequence: Sequence, draft: Draft) -> int:
        """Return how much a prompt still grows, beyond this step, until its first token is out."""
        return sequence.total + 1 - sequence.computed - draft.rows.get(sequence, 0)

    def _headroom(self) -> int:
        """The watermark of tokens held: room for decodes to grow into; 0 where there is no limit."""
        if self._capacity.resident_tokens is None:
            return 0
        growth = -(-len(self.running) // WATERMARK_SEQUENCES) * self.pool.block_tokens
        return max(-(-self._resident_limit // WATERMARK_SHARE), growth)

    def _watermark(self) -> int:
        share = -(-self.pool.blocks // WATERMARK_SHARE)
        return max(share, -(-len(self.running) // WATERMARK_SEQUENCES))

    # Blocks: free list and LRU (inside the pool), then preemption

    def _reserve(self, sequence: Sequence, count: int, draft: Draft) -> bool:
        """Get room for `count` more tokens. False: not now; who runs alone is then exhausted."""
        wanted = self.pool.blocks_for(sequence.computed + count) - len(sequence.table)
        while wanted > self.pool.available or count > draft.resident_left:
            victim = self._victim(sequence)
            if victim is None:
                if self.running == [sequence]:
                    draft.resident_left += sequence.computed
                    self.remove(sequence)
                    self._exhausted.append(sequence)
                return False
            self._preempt(victim, draft)
        sequence.table.extend(self.pool.allocate() for _ in range(wanted))
        return True

    def _victim(self, asker: Sequence) -> Sequence | None:
        """Return the newest sequence younger than `asker`, an unpinned one if there is any.

        The oldest is younger than nobody, so it is never a victim: that is the progress guarantee.
        """
        younger = [s for s in self.running if s.serial > asker.serial]
        unpinned = [s for s in younger if s.preemptions < PINNED_AFTER]
        candidates = unpinned or younger
        return candidates[-1] if candidates else None

    def _preempt(self, victim: Sequence, draft: Draft) -> None:
        draft.drop(victim)
        self._unseat(victim)
        self._enqueue(victim, State.PREEMPTED)
        victim.preemptions += 1
        self.preemptions += 1

    def _seat(self, sequence: Sequence, hits: list[int]) -> None:
        self.queue.take(sequence)
        sequence.move(State.RUNNING)
        sequence.slot = heapq.heappop(self._slots)
        for block in hits:
            self.pool.acquire(block)
        sequence.table = hits
        sequence.computed = len(hits) * self.pool.block_tokens
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.hit_tokens += sequence.computed
            self.queried_tokens += sequence.total if self._may_hit(sequence) else 0
        bisect.insort(self.running, sequence, key=_arrival)

    def _unseat(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a running sequence has a slot"
        self.running.remove(sequence)
        heapq.heappush(self._slots, sequence.slot)
        if sequence.announced:
            self._released.append(sequence.slot)
        self.pool.release(sequence.table)
        sequence.forget_computed()

    # Prefix cache

    def _may_hit(self, sequence: Sequence) -> bool:
        return self._capacity.prefix_cache and not sequence.wants_prompt_logprobs

    def _hit_blocks(self, sequence: Sequence) -> int:
        """The most blocks it may take: the last token must be computed, else there are no logits."""
        return (sequence.total - 1) // self.pool.block_tokens

    def _find_hits(self, sequence: Sequence) -> list[int]:
        hits: list[int] = []
        if not self._may_hit(sequence):
            return hits
        for index in range(self._hit_blocks(sequence)):
            block = self.pool.find(self._content(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def _content(self, sequence: Sequence, index: int) -> Published:
        size = self.pool.block_tokens
        extend(sequence.keys, sequence.root, sequence.history, size, index + 1)
        tokens = block_bytes(sequence.history, size, index)
        return Published(sequence.keys[index], sequence.root, index, tokens)

    def _published(self, rows: Iterable[tuple[Sequence, int]]) -> list[tuple[Sequence, int, Published]]:
        """Return the blocks these rows complete, each content once, without what is published already."""
        complete: dict[bytes, tuple[Sequence, int, Published]] = {}
        if not self._capacity.prefix_cache:
            return []
        size = self.pool.block_tokens
        for sequence, count in rows:
            for index in range(sequence.computed // size, (sequence.computed + count) // size):
                content = self._content(sequence, index)
                if not self.pool.knows(content.key):
                    complete.setdefault(content.key, (sequence, index, content))
        return list(complete.values())

    def _release_siblings(self, first: Sequence) -> None:
        for sibling in self._held.pop(first, ()):
            self._enqueue(sibling)
