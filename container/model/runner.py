"""The native runner: one StepPlan in, one packed forward, sampled tokens out.

Owns: slots (assignment, block tables, history), the order of a step, prompt logprobs.
Must not know: the scheduler, processes, how attention or sampling compute.
Invariant: a step is releases, truncations, assignments, table, restores, forward, samples, saves, in this
order, so that a block is never read after it was given to another sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from container.engine.request import SampledToken
from container.engine.step import (
    ROW_HOLDS_STOPS,
    ROW_PROMPT_LOGPROBS,
    ROW_SAMPLES,
    Capacity,
    RowResult,
    SlotAssignment,
    StepPlan,
    StepResult,
)
from container.kernels.large_pages import LargePages
from container.model.masks import Verdict
from container.model.rows import Logits, PackedRow
from container.model.shape import RunnerConfig, Sizes
from container.model.verify import draw_along

SCORE_ROWS = 64  # positions scored at once: bounds the copy that log-softmax makes


class SlotSampler(Protocol):
    """Draws tokens for slots; container.model.sampler.Sampler is the real one."""

    @property
    def holds_grammars(self) -> bool: ...

    def assign(self, assignment: SlotAssignment) -> None: ...

    def release(self, slot: int) -> None: ...

    def reset(self) -> None: ...

    def prepare(self, slots: Sequence[int]) -> None: ...

    def verdict(self, slot: int) -> Verdict | None: ...

    def sample(
        self, logits: Logits, slots: Sequence[int], positions: Sequence[int], hold_stops: Sequence[bool]
    ) -> list[SampledToken | None]: ...


class NoSampler:
    """The sampler of ranks that follow: they compute every step and draw nothing."""

    holds_grammars = False

    def assign(self, assignment: SlotAssignment) -> None:
        """Nothing is remembered."""

    def prepare(self, slots: Sequence[int]) -> None:
        """Nothing is drawn later."""

    def verdict(self, slot: int) -> Verdict | None:  # noqa: ARG002 - the protocol's
        """No grammar is held to."""
        return None

    def release(self, slot: int) -> None:
        """Nothing was remembered."""

    def reset(self) -> None:
        """Nothing was remembered."""

    def sample(
        self,
        logits: Logits,  # noqa: ARG002 - the protocol's
        slots: Sequence[int],  # noqa: ARG002
        positions: Sequence[int],  # noqa: ARG002
        hold_stops: Sequence[bool],  # noqa: ARG002
    ) -> list[SampledToken | None]:
        raise AssertionError("a follower was given logits")


class StepKV(Protocol):
    """Keys and values of running sequences; container.model.kv_cache and kv_pages are the real ones."""

    def release(self, slot: int) -> None: ...

    def save(self, slot: int, index: int, block: int) -> None: ...

    def forget(self, block: int) -> None: ...

    def restore(self, slot: int, blocks: Sequence[int]) -> None: ...

    def truncate(self, slot: int, tokens: int) -> None: ...

    def reset(self) -> None: ...


class StepModel(Protocol):
    """What computes one packed step; PackedModel and FusedModel are the real ones."""

    @property
    def kv(self) -> StepKV: ...

    @property
    def weight_bytes(self) -> int: ...

    def weight_blocks(self) -> list[tuple[int, int]]: ...

    def mode(self) -> AbstractContextManager[object]: ...

    def logits(self, rows: Sequence[PackedRow]) -> Logits | None: ...

    def close(self) -> None: ...


class Scorer(Protocol):
    """Returns the log probabilities of given tokens; container.model.sampler.score is the real one."""

    def __call__(self, logits: Logits, tokens: Sequence[int], top: int) -> list[SampledToken]: ...


@dataclass(slots=True)
class SlotState:
    """What a runner remembers of a sequence between steps."""

    assignment: SlotAssignment
    table: dict[int, int] = field(default_factory=dict)  # block index in the sequence -> block id


class SlotTable:
    """Slots in use, the same for the native and the compat runner."""

    def __init__(self) -> None:
        self._slots: dict[int, SlotState] = {}

    def __getitem__(self, slot: int) -> SlotState:
        return self._slots[slot]

    def apply(self, plan: StepPlan) -> None:
        """Take over the plan's releases, assignments and table entries, in this order."""
        for slot in plan.releases:
            self._slots.pop(slot, None)
        for assignment in plan.assigns:
            self._slots[assignment.slot] = SlotState(assignment)
        for slot, index, block in triples(plan.table):
            self._slots[slot].table[index] = block

    def begun(self, plan: StepPlan, block_tokens: int) -> list[int]:
        """Return the ids of blocks that `plan` begins to write: all it names but the restored ones."""
        restored = {a.slot: a.cached_tokens // block_tokens for a in plan.assigns}
        return [block for slot, index, block in triples(plan.table) if index >= restored.get(slot, 0)]

    def clear(self) -> None:
        self._slots.clear()


def triples(flat: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Return consecutive (slot, index, block) triples of a flat array."""
    assert len(flat) % 3 == 0, "a flat array of triples is cut short"
    return zip(flat[0::3], flat[1::3], flat[2::3], strict=True)


def pairs(flat: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return consecutive (slot, tokens) pairs of a flat array."""
    assert len(flat) % 2 == 0, "a flat array of pairs is cut short"
    return zip(flat[0::2], flat[1::2], strict=True)


@dataclass(slots=True)
class PlanRow:
    """One row of a plan, with the rows of logits it owns (first, count)."""

    row: int
    slot: int
    start: int
    count: int
    flags: int
    tokens: array[int] = field(repr=False)
    first_logit: int = 0
    logits: int = 0
    drafts: int = 0  # how many of the last tokens are guesses

    @property
    def samples(self) -> bool:
        return bool(self.flags & ROW_SAMPLES)

    @property
    def holds_stops(self) -> bool:
        return bool(self.flags & ROW_HOLDS_STOPS)

    @property
    def scored(self) -> bool:
        return bool(self.flags & ROW_PROMPT_LOGPROBS)


def plan_rows(plan: StepPlan) -> list[PlanRow]:
    """Return the plan's rows with their tokens, and where their logits will be."""
    rows = []
    first = logit = 0
    for row, count in enumerate(plan.counts):
        tokens = plan.tokens[first : first + count]
        entry = PlanRow(row, plan.slots[row], plan.starts[row], count, plan.flags[row], tokens, logit)
        entry.drafts = plan.drafts[row] if plan.drafts else 0
        assert not entry.drafts or (entry.samples and not entry.scored), "drafts follow what is sampled"
        entry.logits = count if entry.scored else int(entry.samples) + entry.drafts
        rows.append(entry)
        first += count
        logit += entry.logits
    assert first == len(plan.tokens), "the plan's token count does not match its rows"
    return rows


def prepare(rows: list[PlanRow], sampler: SlotSampler) -> None:
    """Let the sampler begin what can be computed beside the forward pass of `rows`; call it just before."""
    sampler.prepare([row.slot for row in rows if row.samples])


def step_result(
    plan: StepPlan, rows: list[PlanRow], logits: Logits, slots: SlotTable, sampler: SlotSampler, score: Scorer
) -> StepResult:
    """Sample and score; `logits` is (sum of row.logits, vocabulary), a row's last one is its successor's."""
    drawn = _draw(rows, logits, sampler)
    result = StepResult(plan.number)
    for row in rows:
        if not (row.samples or row.scored):
            continue
        prompt = _prompt_logprobs(row, logits, slots[row.slot].assignment, score) if row.scored else ()
        outcome = RowResult(row.row, prompt_logprobs=prompt)
        if row.samples:
            outcome.failed = not drawn[row.row]
            if not outcome.failed:
                *outcome.accepted, outcome.sampled = drawn[row.row]
            verdict = sampler.verdict(row.slot)
            outcome.ended = verdict is Verdict.COMPLETE
            outcome.grammar_failed = outcome.failed and verdict is Verdict.FAILED
        result.rows.append(outcome)
    return result


def _draw(rows: list[PlanRow], logits: Logits, sampler: SlotSampler) -> dict[int, list[SampledToken]]:
    """Return what each sampling row yields, by row, nothing where it failed; those without drafts at once."""
    drawn: dict[int, list[SampledToken]] = {}
    singles = [row for row in rows if row.samples and not row.drafts]
    if singles:
        picks = [row.first_logit + row.logits - 1 for row in singles]
        tokens = sampler.sample(
            logits if len(picks) == len(logits) else logits[picks],
            [row.slot for row in singles],
            [row.start + row.count for row in singles],
            [row.holds_stops for row in singles],
        )
        drawn = {
            row.row: [] if token is None else [token] for row, token in zip(singles, tokens, strict=True)
        }
    for row in rows:
        if row.drafts:
            known = row.count - row.drafts
            own = logits[row.first_logit : row.first_logit + row.logits]
            drawn[row.row] = draw_along(
                sampler, own, row.slot, row.start + known, row.holds_stops, row.tokens[known:]
            )
    return drawn


def _prompt_logprobs(
    row: PlanRow, logits: Logits, assignment: SlotAssignment, score: Scorer
) -> list[SampledToken]:
    """Return the log probabilities of the prompt tokens that follow the row's positions."""
    last = min(row.start + row.count + 1, assignment.prompt_tokens)
    targets = assignment.history[row.start + 1 : last]
    top = assignment.sampling.prompt_logprobs or 0
    scored: list[SampledToken] = []
    for first in range(0, len(targets), SCORE_ROWS):
        part = targets[first : first + SCORE_ROWS]
        at = row.first_logit + first
        scored.extend(score(logits[at : at + len(part)], part.tolist(), top))
    return scored


class NativeRunner:
    """Runs plans on a model that passed the probe. Implements container.engine.step.Runner."""

    def __init__(
        self, packed: StepModel, sampler: SlotSampler, score: Scorer, sizes: Sizes, capacity: Capacity
    ) -> None:
        self._packed = packed
        self._sampler = sampler
        self._score = score
        self._sizes = sizes
        self._capacity = replace(capacity, grammar=sampler.holds_grammars)
        self._slots = SlotTable()
        self._large_pages = LargePages(packed.weight_blocks())

    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def packed(self) -> StepModel:
        """The model that steps run on; whoever asks it directly runs no steps meanwhile."""
        return self._packed

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; raises KVBudgetExceeded, KeyError for a block never saved, the model's errors."""
        with self._packed.mode():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        rows = self._begin(plan)
        if not rows:
            return StepResult(plan.number)
        logits = self._packed.logits([packed_row(row) for row in rows])
        if logits is None:
            result = StepResult(plan.number)  # a follower: rank 0 samples, the next plan brings its tokens
        else:
            result = step_result(plan, rows, logits, self._slots, self._sampler, self._score)
        self._save(plan)
        return result

    def _begin(self, plan: StepPlan) -> list[PlanRow]:
        """Do all of a step that comes before its forward; return its rows."""
        kv = self._packed.kv
        for slot in plan.releases:
            kv.release(slot)
            self._sampler.release(slot)
        for slot, tokens in pairs(plan.truncates):
            kv.truncate(slot, tokens)
        self._slots.apply(plan)
        for block in self._slots.begun(plan, self._sizes.block_tokens):
            kv.forget(block)  # evicted: what it named would otherwise be held until the id is saved anew
        for assignment in plan.assigns:
            self._start(assignment)
        rows = plan_rows(plan)
        prepare(rows, self._sampler)
        return rows

    def _save(self, plan: StepPlan) -> None:
        for slot, index, block in triples(plan.saves):
            self._packed.kv.save(slot, index, block)

    def _start(self, assignment: SlotAssignment) -> None:
        size = self._sizes.block_tokens
        assert assignment.cached_tokens % size == 0, "cached tokens are whole blocks"
        self._packed.kv.release(assignment.slot)
        self._sampler.assign(assignment)
        if assignment.cached_tokens:
            table = self._slots[assignment.slot].table
            blocks = [table[index] for index in range(assignment.cached_tokens // size)]
            self._packed.kv.restore(assignment.slot, blocks)

    def reset(self) -> None:
        self._packed.kv.reset()
        self._sampler.reset()
        self._slots.clear()

    def close(self) -> None:
        self._large_pages.close()
        self.reset()
        self._packed.close()


def packed_row(row: PlanRow) -> PackedRow:
    """Return `row` as a model takes it, with the tokens whose logits are wanted."""
    if row.scored:
        wanted: Sequence[int] = range(row.count)
    elif row.samples:
        wanted = range(row.count - row.logits, row.count)
    else:
        wanted = ()
    return PackedRow(row.slot, row.start, row.tokens, wanted)


def native_runner(
    packed: StepModel,
    sampler: SlotSampler,
    score: Scorer,
    sizes: Sizes,
    vocabulary: int,
    config: RunnerConfig,
) -> NativeRunner:
    """Return the runner of `packed`, which promises what `sizes` and `config` allow."""
    capacity = replace(sizes.capacity(vocabulary), prefix_cache=config.prefix_cache)
    return NativeRunner(packed, sampler, score, sizes, capacity)
