"""The seam between the engine and whatever computes: one StepPlan in, one StepResult out.

Owns: the plan (integers only), the result, the runner's protocol and its capacity.
Must not know: tensors, devices, ranks. Standard library only.
Invariant: a plan says everything a rank needs; two ranks given the same plans hold the same state.

    plan.tokens   |t0 t1 t2 ... | u0 | v0 v1 ...|        flat, row after row
    plan.counts   |      3      |  1 |     2    |        tokens of each row
    plan.starts   |      0      | 41 |    16    |        position of the row's first token
    plan.slots    |      5      |  0 |     2    |        where the row's KV lives
    plan.drafts   |      0      |  0 |     1    |        how many of the row's last tokens are only guessed

A draft is a guess at what will be sampled. A row of which d tokens are drafts is sampled after each of its
last 1 + d tokens, one after another, for as long as what was sampled is the next draft. The keys and values
of drafts that were not sampled are taken back by the next plan's `truncates`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from container.engine.request import SampledToken, SamplingParams

ROW_SAMPLES = 1  # the row's last token gets logits and one sampled successor
ROW_HOLDS_STOPS = 2  # min_tokens not reached: the slot's stop ids cannot be drawn
ROW_PROMPT_LOGPROBS = 4  # logprobs of this row's prompt tokens are wanted
# The row's one token is what its slot's last row samples, which may not be known yet; the plan's is not read.
ROW_FED = 8


def ints(values: Sequence[int] = ()) -> array[int]:
    """Return a 32-bit signed array of `values`."""
    return array("i", values)


@dataclass(frozen=True, slots=True)
class SlotAssignment:
    """A sequence takes a slot before this step's forward.

    The first `cached_tokens` positions (whole blocks) are restored from the published blocks named by the
    slot's first table entries. `history` is prompt plus output so far; the sampler rebuilds penalty counts
    from it and draws with `sampling.seed` at the absolute position of each new token, so a sequence that
    was preempted goes on with the same draws.
    """

    slot: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    history: array[int] = field(repr=False)


@dataclass(slots=True)
class StepPlan:
    """One forward pass over rows of several sequences (row: consecutive tokens of one sequence).

    Table deltas and saves are flat triples (slot, block index in the sequence, block id). `saves` names the
    blocks that are full once this step has run and shall be kept for the prefix cache; none holds a draft.
    `truncates` are flat pairs (slot, tokens): what the slot holds beyond `tokens` positions were drafts of
    its last row that were not sampled. They take effect after `releases` and before anything else.
    """

    number: int
    slots: array[int] = field(default_factory=ints)
    starts: array[int] = field(default_factory=ints)
    counts: array[int] = field(default_factory=ints)
    flags: array[int] = field(default_factory=ints)
    tokens: array[int] = field(default_factory=ints, repr=False)
    drafts: array[int] = field(default_factory=ints)  # one number a row, or none at all: no row has any
    truncates: array[int] = field(default_factory=ints)
    releases: array[int] = field(default_factory=ints)  # slots freed before `assigns` take effect
    assigns: list[SlotAssignment] = field(default_factory=list)
    table: array[int] = field(default_factory=ints)
    saves: array[int] = field(default_factory=ints)

    @property
    def rows(self) -> int:
        return len(self.slots)


@dataclass(slots=True)
class RowResult:
    """Outcome of one row that samples or wants prompt logprobs.

    `sampled` is None when the row does not sample or `failed` is set (NaN, or every token masked). `ended`
    says that the token completes the row's grammar and nothing may follow it; `grammar_failed` comes with
    `failed`.
    `prompt_logprobs[i]` belongs to the token at position start + i + 1 and is present only where that token
    is part of the prompt. `accepted` are the tokens sampled before `sampled`, each equal to the row's draft
    in the same place.
    """

    row: int
    sampled: SampledToken | None = None
    failed: bool = False
    prompt_logprobs: Sequence[SampledToken] = ()
    ended: bool = False
    grammar_failed: bool = False
    accepted: Sequence[SampledToken] = ()


@dataclass(slots=True)
class StepResult:
    """Results in row order, one per row flagged ROW_SAMPLES or ROW_PROMPT_LOGPROBS."""

    number: int
    rows: list[RowResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a runner can hold and do; fixed after start, equal on every rank."""

    blocks: int  # usable KV blocks, all sequences and published ones together
    block_tokens: int
    slots: int  # sequences running at once
    step_tokens: int  # token budget of one step
    sequence_tokens: int  # longest prompt + output
    vocabulary: int  # width of a row of logits
    prefix_cache: bool = True  # False: blocks are accounted for but never shared
    chunked_prefill: bool = True  # False: a prompt must be computed in one row
    prompt_logprobs: bool = True
    grammar: bool = False  # sampling can be held to a grammar
    # Sum of the lengths of all running sequences, a shared block counted once per sequence that holds it
    # (slabs are copies). None: every slot may be full at once.
    resident_tokens: int | None = None
    draft_tokens: int = 0  # most drafts in a row; 0: the runner verifies none
    runs_ahead: bool = False  # the runner is an AheadRunner: a step may be launched before the last has ended


class Ticket(Protocol):
    """A step that was launched."""

    @property
    def ready(self) -> bool:
        """True when `launch` waited for the step, since its tokens were chosen on the host.

        Always so for a step with drafts, scored rows or rows held to a grammar: what follows depends on more
        than their tokens.
        """


class Runner(Protocol):
    """Computes steps. `run` may raise; the engine then fails the requests of that step and goes on."""

    def capacity(self) -> Capacity: ...

    def run(self, plan: StepPlan) -> StepResult: ...

    def reset(self) -> None:
        """Forget every slot and published block, after a failed step."""

    def close(self) -> None:
        """Wipe KV and free the device."""


class AheadRunner(Runner, Protocol):
    """Computes steps on a device, in the order they were launched, two at most at a time.

    A step may be launched while the one before it runs: rows flagged ROW_FED take their token where it was
    sampled. `run` is `collect(launch(plan))`.
    """

    def launch(self, plan: StepPlan) -> Ticket:
        """Begin a step; raises what `run` raises."""

    def collect(self, ticket: Ticket) -> StepResult:
        """Return what a step gave, in the order of launching; blocks until the device is done with it."""
