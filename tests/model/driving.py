"""Plans for a runner without an engine: sequences in slots, chunks of any size, blocks saved and restored."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from container.engine.request import SamplingParams
from container.engine.step import ROW_SAMPLES, Runner, SlotAssignment, StepPlan, StepResult
from container.model.build import assemble
from container.model.facts import ModelFacts
from container.model.shape import RunnerConfig
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import tiny_source

BLOCK = 4
CONFIG = RunnerConfig(
    sequence_tokens=256,
    running_limit=6,
    step_tokens=64,
    kv_mib=64,
    block_tokens=BLOCK,
    dtype="float32",
    threads=1,
)


@cache
def built(kind: str) -> tuple[Runner, ModelFacts, GreedySampler]:
    """Return the runner of the tiny model `kind`, shared by tests; they leave it reset."""
    samplers: list[GreedySampler] = []

    def make(vocabulary: int) -> GreedySampler:
        samplers.append(GreedySampler(vocabulary))
        return samplers[-1]

    runner, facts = assemble(CONFIG, tiny_source(kind), lambda phase: None, make, score)
    return runner, facts, samplers[0]


@dataclass
class Driven:
    """A sequence and how far it is computed."""

    tokens: list[int]
    slot: int
    computed: int = 0
    blocks: dict[int, int] = field(default_factory=dict)  # index -> id of a saved block


class Driver:
    """Hands out block ids and writes plans; `draws` marks rows whose last token gets a successor."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.number = 0
        self._next_block = 1
        self._plan = StepPlan(0)

    def start(self, slot: int, tokens: Sequence[int], sampling: SamplingParams | None = None) -> Driven:
        sequence = Driven(list(tokens), slot)
        self._assign(sequence, sampling)
        return sequence

    def preempt(self, sequence: Driven, slot: int) -> None:
        """Release the slot; the sequence goes on in `slot` from its saved blocks, one token at least left."""
        self._plan.releases.append(sequence.slot)
        sequence.slot = slot
        sequence.computed = 0
        while sequence.computed // BLOCK in sequence.blocks and sequence.computed + BLOCK < len(
            sequence.tokens
        ):
            sequence.computed += BLOCK
        self._assign(sequence, None)
        for index in range(sequence.computed // BLOCK):
            self._plan.table.extend((slot, index, sequence.blocks[index]))

    def release(self, sequence: Driven) -> None:
        self._plan.releases.append(sequence.slot)

    def row(self, sequence: Driven, count: int, flags: int = ROW_SAMPLES) -> None:
        """Plan the sequence's next `count` tokens and save every block they complete."""
        plan, first = self._plan, sequence.computed
        plan.slots.append(sequence.slot)
        plan.starts.append(first)
        plan.counts.append(count)
        plan.flags.append(flags)
        plan.tokens.extend(sequence.tokens[first : first + count])
        sequence.computed += count
        for index in range(first // BLOCK, sequence.computed // BLOCK):
            if index not in sequence.blocks:
                sequence.blocks[index] = self._next_block
                self._next_block += 1
            triple = (sequence.slot, index, sequence.blocks[index])
            plan.table.extend(triple)
            if self.runner.capacity().prefix_cache:
                plan.saves.extend(triple)

    def step(self) -> StepResult:
        self.number += 1
        plan, self._plan = self._plan, StepPlan(self.number + 1)
        return self.runner.run(plan)

    def _assign(self, sequence: Driven, sampling: SamplingParams | None) -> None:
        self._plan.assigns.append(
            SlotAssignment(
                slot=sequence.slot,
                sampling=sampling or SamplingParams(temperature=0.0),
                stop_token_ids=(),
                prompt_tokens=len(sequence.tokens),
                cached_tokens=sequence.computed,
                history=array("i", sequence.tokens),
            )
        )


def greedy(runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int, chunk: int) -> list[list[int]]:
    """Return the continuations of `prompts`, all running at once, prompts in chunks of `chunk` tokens."""
    driver = Driver(runner)
    sequences = [driver.start(slot, prompt) for slot, prompt in enumerate(prompts)]
    lengths = [len(prompt) for prompt in prompts]
    while any(len(s.tokens) - n < new_tokens for s, n in zip(sequences, lengths, strict=True)):
        planned = []
        for sequence, length in zip(sequences, lengths, strict=True):
            if len(sequence.tokens) - length >= new_tokens:
                continue
            left = len(sequence.tokens) - sequence.computed
            count = min(left, chunk) if runner.capacity().chunked_prefill else left
            driver.row(sequence, count, ROW_SAMPLES if count == left else 0)
            if count == left:
                planned.append(sequence)
        for sequence, row in zip(planned, driver.step().rows, strict=True):
            assert row.sampled is not None
            sequence.tokens.append(row.sampled.token)
    for sequence in sequences:
        driver.release(sequence)
    driver.step()
    return [s.tokens[n:] for s, n in zip(sequences, lengths, strict=True)]
