"""A runner without a model: it keeps tokens where keys and values would lie, and trusts no plan.

Two storages side by side, as the two kinds of real runner have them, must always tell the same history:

    slab   per slot, private; restored from the block store, saved to it            (CPU)
    pages  by block id, shared by all tables that name the block, written in place  (GPU)

The next token is a hash of the history read back from both, so a block that is freed, reused, shared or
published wrongly shows as a wrong token or as a `PlanError`.

Drafts lie in both storages like any token until the next plan takes them back. So that guesses hold now and
then, `min_p` stands for how often the model repeats itself: its token is then the one PERIOD places before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from container.engine.request import EngineRequest, SampledToken, SamplingParams
from container.engine.sequence import choice_seed
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
from tests.engine.fake_grammars import FakeGrammars, turn

PERIOD = 5
POISON = -1  # what a block holds that nobody has written since it was handed out


class PlanError(AssertionError):
    """The plan contradicts itself or what was planned before. Not caught by the engine's tests."""


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise PlanError(sentence)


def next_token(history: Iterable[int], sampling: SamplingParams, vocabulary: int, banned: set[int]) -> int:
    """Return the token that follows `history`: depends on every token, its position and the seed."""
    tokens = array("i", history)
    if sampling.min_p and len(tokens) >= PERIOD and tokens[-PERIOD] not in banned:
        chance = int.from_bytes(hashlib.sha256(b"repeats" + tokens.tobytes()).digest()[:4], "little") / 2**32
        if chance < sampling.min_p:
            return tokens[-PERIOD]
    draw = 0
    while True:
        message = tokens.tobytes() + sampling.seed.to_bytes(8, "little") + draw.to_bytes(4, "little")
        token = int.from_bytes(hashlib.sha256(message).digest()[:8], "little") % vocabulary
        if token not in banned:
            return token
        draw += 1


def prompt_logprob(history: Iterable[int]) -> float:
    """Return a number for the last token of `history` that depends on all of it."""
    digest = hashlib.sha256(array("i", history).tobytes()).digest()
    return -int.from_bytes(digest[:4], "little") / 2**32


def expected_tokens(request: EngineRequest, choice: int, vocabulary: int) -> list[int]:
    """Return what one choice must yield, computed without any engine."""
    sampling = replace(request.sampling, seed=choice_seed(request.sampling.seed, choice))
    history = list(request.prompt)
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        held = len(tokens) < request.min_tokens
        banned = set(request.stop_token_ids) if held else set()
        if turn(request.sampling) == ("breaks", len(tokens) + 1):
            break
        tokens.append(next_token(history, sampling, vocabulary, banned))
        history.append(tokens[-1])
        if not held and tokens[-1] in request.stop_token_ids:
            break
        if turn(request.sampling) == ("ends", len(tokens)):
            break
    return tokens


@dataclass
class _Slot:
    assignment: SlotAssignment
    slab: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    drafts: int = 0  # at the end of the slab, of which some may have been sampled


class FakeRunner:
    """Runs plans on simulated blocks and records what it saw.

    `fault` is asked before each step and may raise; `bad_rows` names rows that come back failed.
    """

    def __init__(self, capacity: Capacity, grammars: FakeGrammars | None = None) -> None:
        self._capacity = capacity
        self._grammars = grammars or FakeGrammars()
        self.fault: Callable[[StepPlan], None] = lambda plan: None
        self.bad_rows: Callable[[StepPlan], set[int]] = lambda plan: set()
        self.alter: Callable[[StepResult], StepResult] = lambda result: result
        self.plans: list[StepPlan] = []
        self.resets = 0
        self.problem: PlanError | None = None
        self.reset()
        self.resets = 0

    def capacity(self) -> Capacity:
        return self._capacity

    def reset(self) -> None:
        self.slots: dict[int, _Slot] = {}
        self.store: dict[int, tuple[int, ...]] = {}
        self.pages: dict[int, list[int]] = {}
        self.resets += 1

    def close(self) -> None:
        self.reset()

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.fault(plan)
        try:
            return self.alter(self._run(plan))
        except PlanError as problem:
            self.problem = problem  # the engine treats it as a failed step; tests look here
            raise

    def _run(self, plan: StepPlan) -> StepResult:
        self._check_shape(plan)
        for slot in plan.releases:
            require(slot in self.slots, "a slot is released that nobody has")
            self._release(self.slots.pop(slot))
        self._truncate(plan)
        for assignment in plan.assigns:
            require(assignment.slot not in self.slots, "a slot is assigned twice")
            require(0 <= assignment.slot < self._capacity.slots, "a slot does not exist")
            require(self._grammars.usable(assignment.sampling.grammar), "a grammar is not ready or not held")
            self.slots[assignment.slot] = _Slot(assignment)
        self._extend_tables(plan)
        for assignment in plan.assigns:
            self._restore(self.slots[assignment.slot])
            self._check_residents()
        result = StepResult(plan.number)
        bad = self.bad_rows(plan)
        offset = 0
        for row in range(plan.rows):
            tokens = plan.tokens[offset : offset + plan.counts[row]]
            offset += plan.counts[row]
            self._write(plan, row, tokens)
            self._check_residents()
        for row in range(plan.rows):
            if plan.flags[row] & (ROW_SAMPLES | ROW_PROMPT_LOGPROBS):
                failed = RowResult(row, failed=True)
                result.rows.append(failed if row in bad else self._result(plan, row))
        self._save(plan)
        self._check_no_shared_writer()
        return result

    def _check_shape(self, plan: StepPlan) -> None:
        sizes = {len(plan.slots), len(plan.starts), len(plan.counts), len(plan.flags)}
        require(len(sizes) == 1, "row arrays differ in length")
        require(plan.rows > 0, "a plan without rows")
        require(len(set(plan.slots)) == plan.rows, "two rows of one slot")
        require(sum(plan.counts) == len(plan.tokens), "counts do not sum to the tokens")
        require(min(plan.counts) > 0, "an empty row")
        require(len(plan.drafts) in (0, plan.rows), "drafts are not told for each row")
        require(len(plan.truncates) % 2 == 0, "broken pairs")
        for count, flags, drafts in zip(plan.counts, plan.flags, plan.drafts, strict=False):
            require(0 <= drafts <= self._capacity.draft_tokens, "more drafts than the runner verifies")
            require(drafts < count, "a row of nothing but drafts")
            require(drafts == 0 or flags & ROW_SAMPLES > 0, "drafts in a row that does not sample")
        if self._capacity.chunked_prefill:
            require(len(plan.tokens) <= self._capacity.step_tokens, "the token budget is exceeded")
        require(len(plan.table) % 3 == 0 and len(plan.saves) % 3 == 0, "broken triples")

    def _check_residents(self) -> None:
        limit = self._capacity.resident_tokens
        held = sum(len(slot.slab) for slot in self.slots.values())
        require(limit is None or held <= limit, "running sequences hold more tokens than there is room for")

    def _release(self, slot: _Slot) -> None:
        for block in slot.table:
            if block not in self.store:
                self.pages[block] = [POISON] * self._capacity.block_tokens

    def _truncate(self, plan: StepPlan) -> None:
        size = self._capacity.block_tokens
        for number, tokens in zip(plan.truncates[::2], plan.truncates[1::2], strict=True):
            require(number in self.slots, "a slot is truncated that nobody has")
            slot = self.slots[number]
            require(len(slot.slab) - slot.drafts <= tokens < len(slot.slab), "more than drafts is taken back")
            for at in range(tokens, len(slot.slab)):
                self.pages[slot.table[at // size]][at % size] = POISON
            del slot.slab[tokens:], slot.table[-(-tokens // size) :]
            slot.drafts = 0

    def _extend_tables(self, plan: StepPlan) -> None:
        size = self._capacity.block_tokens
        fresh: list[int] = []
        for at in range(0, len(plan.table), 3):
            slot, index, block = plan.table[at : at + 3]
            require(slot in self.slots, "a table of a free slot grows")
            held = self.slots[slot]
            require(index == len(held.table), "a table grows with a hole")
            require(1 <= block <= self._capacity.blocks, "a block id outside the pool")
            require(block not in held.table, "a table holds a block twice")
            held.table.append(block)
            if index * size >= held.assignment.cached_tokens:
                fresh.append(block)
        for block in fresh:  # handed out anew: whatever was published there is gone
            self.store.pop(block, None)
            self.pages[block] = [POISON] * size

    def _restore(self, slot: _Slot) -> None:
        given, size = slot.assignment, self._capacity.block_tokens
        require(given.cached_tokens % size == 0, "part of a block is restored")
        require(given.cached_tokens < len(given.history), "nothing is left to compute")
        require(given.prompt_tokens <= len(given.history), "the history is shorter than the prompt")
        for index in range(given.cached_tokens // size):
            block = slot.table[index]
            require(block in self.store, "a block is restored that was never saved, or has been reused")
            expected = tuple(given.history[index * size : (index + 1) * size])
            require(self.store[block] == expected, "a restored block holds other tokens")
            slot.slab.extend(self.store[block])

    def _write(self, plan: StepPlan, row: int, tokens: array[int]) -> None:
        require(plan.slots[row] in self.slots, "a row of a free slot")
        slot, size = self.slots[plan.slots[row]], self._capacity.block_tokens
        require(plan.starts[row] == len(slot.slab), "positions are not contiguous")
        slot.drafts = plan.drafts[row] if plan.drafts else 0
        for token in tokens:
            index, place = divmod(len(slot.slab), size)
            require(index < len(slot.table), "a token has no block")
            require(slot.table[index] not in self.store, "a published block is written")
            slot.slab.append(token)
            self.pages[slot.table[index]][place] = token
        history = slot.assignment.history
        require(slot.slab[: len(history)] == list(history[: len(slot.slab)]), "other tokens than announced")
        if not self._capacity.chunked_prefill and plan.starts[row] < len(history):
            require(len(slot.slab) >= len(history), "a prompt was cut")

    def _read(self, slot: _Slot) -> list[int]:
        size = self._capacity.block_tokens
        paged = [self.pages[slot.table[p // size]][p % size] for p in range(len(slot.slab))]
        require(paged == slot.slab, "pages and slab tell different histories")
        require(POISON not in paged, "a freed block is read")
        return paged

    def _result(self, plan: StepPlan, row: int) -> RowResult:
        slot, flags = self.slots[plan.slots[row]], plan.flags[row]
        given, history = slot.assignment, self._read(slot)
        result = RowResult(row)
        if flags & ROW_SAMPLES:
            known = len(history) - slot.drafts
            for end in range(known, len(history) + 1):
                made = end + 1 - given.prompt_tokens
                if turn(given.sampling) == ("breaks", made):
                    if end == known:
                        return RowResult(row, failed=True, grammar_failed=True)
                    break  # it fails when it comes to that
                if result.sampled is not None:
                    result.accepted = (*result.accepted, result.sampled)
                banned = set(given.stop_token_ids) if flags & ROW_HOLDS_STOPS else set()
                token = next_token(history[:end], given.sampling, self._capacity.vocabulary, banned)
                asked = given.sampling.top_logprobs is not None
                result.sampled = SampledToken(token, logprob=-1.0 if asked else None)
                result.ended = turn(given.sampling) == ("ends", made)
                if result.ended or end == len(history) or token != history[end]:
                    break
        if flags & ROW_PROMPT_LOGPROBS:
            ends = range(plan.starts[row] + 1, min(len(history) + 1, given.prompt_tokens))
            full = list(given.history)
            result.prompt_logprobs = tuple(
                SampledToken(full[end], logprob=prompt_logprob(full[: end + 1])) for end in ends
            )
        return result

    def _save(self, plan: StepPlan) -> None:
        size = self._capacity.block_tokens
        for at in range(0, len(plan.saves), 3):
            number, index, block = plan.saves[at : at + 3]
            require(self._capacity.prefix_cache, "a block is saved without a prefix cache")
            slot = self.slots[number]
            require(slot.table[index] == block, "a saved block is not in the table")
            known = len(slot.slab) - slot.drafts
            require(known >= (index + 1) * size, "a saved block is not full, or holds drafts")
            require(block not in self.store, "a block is saved twice")
            self.store[block] = tuple(slot.slab[index * size : (index + 1) * size])

    def _check_no_shared_writer(self) -> None:
        holders: dict[int, int] = {}
        for slot in self.slots.values():
            for block in slot.table:
                holders[block] = holders.get(block, 0) + 1
        for block, count in holders.items():
            require(count == 1 or block in self.store, "an unpublished block is in two tables")
