"""From a decision (who computes how many tokens) to the integers a runner needs.

Owns: the outline of a step while it is decided, and its translation into a StepPlan.
Must not know: policy, block states, time. Standard library only.
Invariant: rows lie in the plan in the order they were decided; a slot's table is told to the runner once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from container.engine.blocks import Published
from container.engine.sequence import Sequence
from container.engine.step import (
    ROW_FED,
    ROW_HOLDS_STOPS,
    ROW_PROMPT_LOGPROBS,
    ROW_SAMPLES,
    SlotAssignment,
    StepPlan,
    ints,
)

Publication = tuple[Sequence, int, Published]  # owner, index of the block in it, content


@dataclass(slots=True)
class Outline:
    """A step being decided.

    `left` is what remains of the token budget, `resident_left` of the tokens that running sequences may hold
    together (see Capacity.resident_tokens).
    """

    left: int
    resident_left: int
    rows: dict[Sequence, int] = field(default_factory=dict)
    drafts: dict[Sequence, array[int]] = field(default_factory=dict)  # beyond the tokens of `rows`
    prefills: int = 0
    preempted: bool = False

    def put(self, sequence: Sequence, count: int) -> None:
        """Compute `count` tokens of `sequence`."""
        self.rows[sequence] = count
        self.left -= count
        self.resident_left -= count
        self.prefills += count > 1

    def speculate(self, sequence: Sequence, drafts: array[int]) -> None:
        """Add `drafts`, at least one, to the row of a sequence that decodes."""
        assert self.rows[sequence] == 1 and drafts, "drafts follow the one known token of a decoding row"
        self.drafts[sequence] = drafts
        self.left -= len(drafts)
        self.resident_left -= len(drafts)

    def drop(self, sequence: Sequence) -> None:
        """Take a preempted sequence out again, if it is in; call it while it still holds what it computed."""
        assert not self.drafts, "drafts come after all that may preempt"
        self.preempted = True
        count = self.rows.pop(sequence, 0)
        self.left += count
        self.resident_left += sequence.computed + count
        self.prefills -= count > 1


@dataclass(frozen=True, slots=True)
class Step:
    """A decided step: the runner's plan, and what to account for once it has run.

    `rows` count known tokens; `drafts` are what some rows have in addition.
    """

    plan: StepPlan
    rows: list[tuple[Sequence, int]]
    drafts: dict[Sequence, array[int]]
    publish: list[Publication]


def build(
    number: int,
    outline: Outline,
    releases: Iterable[int],
    truncated: Iterable[Sequence],
    publications: Callable[[Iterable[tuple[Sequence, int]]], list[Publication]],
) -> Step:
    """Return the step that `outline` describes; marks what the runner is told about each sequence.

    `truncated` are the running sequences whose last row ended in drafts that were not sampled.
    """
    rows = list(outline.rows.items())
    plan = StepPlan(number, releases=ints(sorted(releases)))
    for sequence in truncated:
        assert sequence.slot is not None, "what is truncated lies in a slot"
        plan.truncates.extend((sequence.slot, sequence.computed))
    for sequence, count in rows:
        assert sequence.slot is not None, "a row has a slot"
        if not sequence.announced:
            plan.assigns.append(_assignment(sequence))
        if sequence.announced != len(sequence.table):
            for index in range(sequence.announced, len(sequence.table)):
                plan.table.extend((sequence.slot, index, sequence.table[index]))
            sequence.announced = len(sequence.table)
        plan.slots.append(sequence.slot)
        plan.starts.append(sequence.computed)
        drafts = outline.drafts.get(sequence)
        plan.counts.append(count + (len(drafts) if drafts else 0))
        plan.flags.append(_flags(sequence, count))
        plan.tokens.extend(sequence.history[sequence.computed : sequence.computed + count])
        if drafts:
            plan.tokens.extend(drafts)
    if outline.drafts:
        plan.drafts.extend(len(outline.drafts.get(sequence, ())) for sequence, _ in rows)
    publish = publications(rows)
    for owner, index, _ in publish:
        assert owner.slot is not None, "a saved block lies in a slot"
        plan.saves.extend((owner.slot, index, owner.table[index]))
    return Step(plan, rows, outline.drafts, publish)


def _assignment(sequence: Sequence) -> SlotAssignment:
    assert sequence.slot is not None and not sequence.expects, (
        "who is assigned a slot has one, and all tokens"
    )
    return SlotAssignment(
        slot=sequence.slot,
        sampling=sequence.sampling,
        stop_token_ids=sequence.stop_token_ids,
        prompt_tokens=sequence.prompt_tokens,
        cached_tokens=sequence.computed,
        history=array("i", sequence.history),  # a copy: the runner may keep it
    )


def _flags(sequence: Sequence, count: int) -> int:
    samples = sequence.computed + count == sequence.total
    flags = 0
    if sequence.expects:
        assert count == 1 and samples, "what is under way is the last of a row"
        flags |= ROW_FED
    if samples:
        flags |= ROW_SAMPLES
        if sequence.generated < sequence.request.min_tokens:
            flags |= ROW_HOLDS_STOPS
    if sequence.wants_prompt_logprobs:
        flags |= ROW_PROMPT_LOGPROBS
    return flags
