"""Who computes how many tokens in the next step.

Owns: running sequences, slots, the order of relief when blocks are short, who waits for another's prompt.
Must not know: what a token means, stop rules, when guessing pays, clients, time. Standard library only.
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
from array import array
from collections.abc import Collection, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Final

from container.engine.blocks import BlockPool
from container.engine.holding import Holding
from container.engine.planning import Outline, Step, build
from container.engine.prefix_cache import PrefixCache
from container.engine.sequence import Sequence, State
from container.engine.speculation import Speculation
from container.engine.step import Capacity
from container.engine.tenants import TenantQueues

PINNED_AFTER: Final = 3  # preemptions; a fourth would recompute more than it frees
WATERMARK_SHARE: Final = 100  # one block in so many stays free on admission, for decodes to grow into
WATERMARK_SEQUENCES: Final = 8  # and one block per so many running sequences, whichever is more
UNLIMITED_TOKENS: Final = 1 << 62  # `resident_tokens` None, without a second kind of arithmetic
NONE_ACCEPTED: Final[Mapping[Sequence, int]] = MappingProxyType({})

_arrival = attrgetter("serial")


class Scheduler:
    """Turns sequences into steps: `plan`, run it, `advance`, `commit` (or `reset` after a failure).

    Between the last two the next may be planned, for what is not known to have ended.
    """

    def __init__(self, capacity: Capacity, running_limit: int) -> None:
        self._capacity = capacity
        self._limit = running_limit
        resident = capacity.resident_tokens
        self._resident_limit = UNLIMITED_TOKENS if resident is None else resident
        self.pool = BlockPool(capacity.blocks, capacity.block_tokens)
        self._cache = PrefixCache(self.pool, capacity.prefix_cache)
        self.queue = TenantQueues(capacity.step_tokens)
        self.running: list[Sequence] = []  # oldest first
        self.forget_counts()
        self._holding = Holding()
        self._slots = list(range(running_limit))  # a heap: the lowest free slot is taken first
        self.speculation = Speculation(capacity)
        self._overhanging: dict[
            Sequence, None
        ] = {}  # the runner holds drafts of theirs that were not sampled
        self._released: list[int] = []  # slots the runner has not been told to free
        self._exhausted: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """Sequences that have been accepted and do not run."""
        return len(self.queue) + len(self._holding)

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
        aside = self._cache.may_hit(first) and self._cache.hit_blocks(first) > 0
        self._enqueue(first)
        for sibling in siblings:
            if aside:
                self._holding.put(sibling, first, first.prompt_tokens)
            else:
                self._enqueue(sibling)

    def remove(self, sequence: Sequence) -> None:
        """Finish a sequence in whatever state it is and free what it holds."""
        if sequence.state is State.RUNNING:
            self._unseat(sequence)
        elif sequence.state is State.HELD:
            self._holding.discard(sequence)
        elif sequence.state is not State.FINISHED:
            self.queue.discard(sequence)
        sequence.move(State.FINISHED)
        self.queue.refund(sequence)
        for waiter in self._holding.orphans(sequence):
            self._enqueue(waiter)

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
        self._cache.reset()
        self.pool.reset()

    def _enqueue(self, sequence: Sequence, state: State = State.WAITING) -> None:
        sequence.move(state)
        self.queue.push(sequence)

    # One step

    def plan(self, number: int) -> Step | None:
        """Return the next step, or None when nothing can run. Call `take_exhausted` after it."""
        resident_left = self._resident_limit - sum(sequence.computed for sequence in self.running)
        outline = Outline(self._capacity.step_tokens, resident_left)
        self._decode(outline)
        self._prefill(outline)
        self._admit(outline)
        self._speculate(outline)
        if not outline.rows:
            return None
        step = build(number, outline, self._released, self._overhanging, self._cache.completed)
        self._released = []
        self._overhanging = {}
        return step

    def take_exhausted(self) -> list[Sequence]:
        """Return, once, the sequences that ran alone and still could not get room; they are FINISHED."""
        exhausted, self._exhausted = self._exhausted, []
        return exhausted

    def advance(self, step: Step) -> None:
        """Count what a step computes that was launched, for those of its sequences that still run."""
        for sequence, count in step.rows:
            if sequence.state is State.RUNNING:
                sequence.computed += count

    def commit(
        self, step: Step, failed: Collection[Sequence], accepted: Mapping[Sequence, int] = NONE_ACCEPTED
    ) -> None:
        """Account for a step that has run; what `failed` ones computed is never shown to others.

        `accepted` are numbers of drafts that were sampled. The room of those that were not is free again.
        """
        for sequence in failed:
            for block in sequence.table:
                self.pool.forget(block)
        for (sequence, count), start in zip(step.rows, step.plan.starts, strict=True):
            if sequence.state is State.RUNNING:  # who left or was preempted meanwhile holds nothing
                sequence.confirmed = start + count
        for sequence, index, content in step.publish:
            if sequence not in failed and sequence.state is State.RUNNING:
                self.pool.publish(sequence.table[index], content)
        self._cache.landed(content.key for _, _, content in step.publish)
        for sequence, drafts in step.drafts.items():
            if sequence not in failed and sequence.state is State.RUNNING:
                self._settle(sequence, len(drafts), accepted.get(sequence, 0))
        for sequence, _ in step.rows:
            for waiter in self._holding.ready(sequence):
                self._enqueue(waiter)

    def _settle(self, sequence: Sequence, drafts: int, accepted: int) -> None:
        """Count what was accepted of a row's drafts and take back the rest."""
        self.speculation.settle(sequence, drafts, accepted)
        sequence.computed += accepted
        sequence.confirmed += accepted
        if accepted < drafts:
            self._overhanging[sequence] = None
        kept = self.pool.blocks_for(sequence.computed)
        self.pool.release(sequence.table[kept:])
        del sequence.table[kept:]
        sequence.announced = min(sequence.announced, kept)

    def check(self) -> None:
        """Raise AssertionError unless what this file promises holds; for tests, between steps."""
        self.pool.check(sequence.table for sequence in self.running)
        ages = [sequence.serial for sequence in self.running]
        assert ages == sorted(set(ages)), "running sequences are not in order of arrival"
        seats = [sequence.slot for sequence in self.running]
        assert sorted([*seats, *self._slots]) == list(range(self._limit)), "a slot is lost or taken twice"  # type: ignore[type-var]
        self._holding.check()
        held = sum(sequence.computed for sequence in self.running)
        assert held <= self._resident_limit, "running sequences hold more tokens than the runner has room for"
        assert all(s in self.running for s in self._overhanging), "drafts are left of who does not run"
        for sequence in self.running:
            assert sequence.offered <= sequence.computed // self.pool.block_tokens, "a draft was published"
            assert sequence.state is State.RUNNING, "a sequence runs that is not RUNNING"
            assert sequence.computed < sequence.total, "a running sequence has nothing to compute"
            assert sequence.confirmed <= sequence.computed, "what is confirmed was never planned"
            assert len(sequence.table) == self.pool.blocks_for(sequence.computed), "blocks and tokens differ"

    # Order of a step

    def _decode(self, outline: Outline) -> None:
        for sequence in [s for s in self.running if s.remaining == 1 and not s.complete]:
            if sequence.state is State.RUNNING and self._reserve(sequence, 1, outline):
                outline.put(sequence, 1)

    def _prefill(self, outline: Outline) -> None:
        partial = [s for s in self.running if s.remaining > 1]
        owed = owed_tokens = 0  # what older prompts still need
        for place, sequence in enumerate(partial):
            if sequence.state is not State.RUNNING:
                continue  # preempted for an older one
            others = place + 1 < len(partial) or len(self.queue) > 0
            count = self._chunk(sequence, outline, others)
            if place == 0:
                # may preempt, for one block or token
                count = self._fit(sequence, count, max(1, self.pool.available), max(1, outline.resident_left))
            else:
                # Prompts that each hold a part of the pool would wait for each other for ever, so the
                # younger ones take only what the older ones do not need.
                tokens = outline.resident_left - owed_tokens
                count = self._fit(sequence, count, self.pool.available - owed, tokens)
            if count > 0 and self._reserve(sequence, count, outline):
                outline.put(sequence, count)
            owed += self._owed(sequence)
            owed_tokens += self._owed_tokens(sequence, outline)

    def _admit(self, outline: Outline) -> None:
        if outline.preempted:
            return  # there was no room for those who ran, so there is none for more
        partial = [s for s in self.running if s.remaining > 1]
        owed = sum(self._owed(s) for s in partial)
        owed_tokens = sum(self._owed_tokens(s, outline) for s in partial)
        while outline.left > 0 and len(self.running) < self._limit:
            sequence = self.queue.head()
            if sequence is None:
                return
            hits = self._cache.find(sequence)
            coming = self._cache.coming(sequence, len(hits), self.running)
            if coming is not None and sequence.state is State.WAITING:
                # Others go first meanwhile; computing the same prompt at the same time would help nobody.
                self.queue.discard(sequence)
                self._holding.put(sequence, *coming)
                continue
            needed = self.pool.blocks_for(sequence.total + 1) - len(hits)
            supply = self.pool.available - self.pool.count_cached(hits) - owed
            if self.running and supply < needed + self._watermark():
                return
            if self.running and outline.resident_left - owed_tokens < sequence.total + 1 + self._headroom():
                return
            computed = len(hits) * self.pool.block_tokens
            others = len(self.queue) > 1
            count = self._chunk(sequence, outline, others, computed)
            if count == 0:
                return
            self._seat(sequence, hits)
            outline.resident_left -= computed
            if self._reserve(sequence, count, outline):
                outline.put(sequence, count)
                owed += self._owed(sequence)
                owed_tokens += self._owed_tokens(sequence, outline)

    def _speculate(self, outline: Outline) -> None:
        """Add drafts to rows that decode, out of what nobody else could use in this step."""
        if self.waiting or outline.preempted or not self.speculation.worthwhile(self.running):
            return
        left, blocks = min(outline.left, outline.resident_left), self.pool.available
        proposals: dict[Sequence, array[int]] = {}
        for sequence in outline.rows:
            room = (len(sequence.table) + blocks) * self.pool.block_tokens - sequence.computed - 1
            drafts = self.speculation.propose(sequence, min(room, left))
            if drafts:
                proposals[sequence] = drafts
                left -= len(drafts)
                blocks -= self._blocks_short(sequence, 1 + len(drafts))
        if proposals and self.speculation.pays(len(outline.rows), proposals):
            for sequence, drafts in proposals.items():
                wanted = self._blocks_short(sequence, 1 + len(drafts))
                sequence.table.extend(self.pool.allocate() for _ in range(wanted))
                outline.speculate(sequence, drafts)

    def _blocks_short(self, sequence: Sequence, count: int) -> int:
        """Return how many blocks `count` more tokens need beyond those the sequence holds."""
        return self.pool.blocks_for(sequence.computed + count) - len(sequence.table)

    def _chunk(self, sequence: Sequence, outline: Outline, others: bool, computed: int | None = None) -> int:
        """Return how many tokens of a prompt to compute now: half of what is left if `others` wait."""
        computed = sequence.computed if computed is None else computed
        remaining = sequence.total - computed
        if not self._capacity.chunked_prefill:
            # A prompt that cannot be cut may be longer than the budget: it goes when no other prompt has.
            return remaining if remaining <= outline.left or not outline.prefills else 0
        cap = max(outline.left, 0)
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

    def _owed_tokens(self, sequence: Sequence, outline: Outline) -> int:
        """Return how much a prompt still grows, beyond this step, until its first token is out."""
        return sequence.total + 1 - sequence.computed - outline.rows.get(sequence, 0)

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

    def _reserve(self, sequence: Sequence, count: int, outline: Outline) -> bool:
        """Get room for `count` more tokens. False: not now; who runs alone is then exhausted."""
        wanted = self._blocks_short(sequence, count)
        while wanted > self.pool.available or count > outline.resident_left:
            victim = self._victim(sequence)
            if victim is None:
                if self.running == [sequence] and not sequence.expects:  # else it may be about to end
                    outline.resident_left += sequence.computed
                    self.remove(sequence)
                    self._exhausted.append(sequence)
                return False
            self._preempt(victim, outline)
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

    def _preempt(self, victim: Sequence, outline: Outline) -> None:
        outline.drop(victim)
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
        sequence.computed = sequence.confirmed = len(hits) * self.pool.block_tokens
        sequence.offered = len(hits)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.hit_tokens += sequence.computed
            self.queried_tokens += sequence.total if self._cache.may_hit(sequence) else 0
        bisect.insort(self.running, sequence, key=_arrival)

    def _unseat(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a running sequence has a slot"
        self.running.remove(sequence)
        heapq.heappush(self._slots, sequence.slot)
        if sequence.announced:
            self._released.append(sequence.slot)
        self.pool.release(sequence.table)
        self._overhanging.pop(sequence, None)
        sequence.forget_computed()
