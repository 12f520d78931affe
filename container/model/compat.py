"""The runner for models that cannot attend through our hook: transformers' own forward and cache.

Owns: one cache object per slot, the choice between cached and recomputed decoding.
Must not know: the hook, slabs, blocks (the engine accounts for them all the same).
Invariant: it gives the tokens `model.generate` gives; it is slower, never different.

A prompt is one forward (hybrid and state-space models cannot continue a prefill), then one token per step,
sequence by sequence. Where a model's cache does not continue correctly, the whole history is recomputed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from container.engine.step import Capacity, StepPlan, StepResult
from container.model.runner import PlanRow, Scorer, SlotSampler, SlotTable, plan_rows, prepare, step_result

CACHE_NAMES: Final = (
    "past_key_values",
    "cache_params",
)  # attention and hybrid models; pure state-space models
CONTINUATION_ERROR: Final = 1e-3  # relative, fp32; bf16 noise is judged at BF16_ERROR
BF16_ERROR: Final = 0.03


@dataclass(slots=True)
class Past:
    """A sequence's state inside the model: its tokens so far, and the cache object unless recomputing."""

    tokens: array[int] = field(default_factory=lambda: array("i"), repr=False)
    name: str | None = None
    cache: Any = None


class PlainModel:
    """A model called the way transformers means it, one sequence at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.cached = True  # False: recompute the history every step

    @torch.inference_mode()
    def advance(self, past: Past, tokens: Sequence[int] | array[int], wanted: int) -> Tensor:
        """Append `tokens` to the sequence; return the logits of the last `wanted` positions, float32."""
        past.tokens.extend(tokens)
        if not self.cached:
            output = self._model(input_ids=_batch(past.tokens), use_cache=False)
        else:
            known = {past.name: past.cache} if past.name is not None else {}
            output = self._model(input_ids=_batch(tokens), use_cache=True, **known)
            past.name, past.cache = _cache_of(output)
        logits: Tensor = output.logits[0]
        return logits[len(logits) - wanted :].float()

    def vocabulary(self) -> int:
        """Return the width of a row of logits."""
        with torch.inference_mode():
            return int(self._model(input_ids=_batch((0, 1)), use_cache=False).logits.shape[-1])

    def check(self, vocabulary: int) -> None:
        """Switch to recomputing when prefill and decode disagree with one whole forward."""
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randint(0, vocabulary, (7,), generator=generator).tolist()
        with torch.inference_mode():
            whole = self._model(input_ids=_batch(tokens), use_cache=False).logits[0, 4:].float()
        limit = BF16_ERROR if _dtype(self._model) == torch.bfloat16 else CONTINUATION_ERROR
        try:
            past = Past()
            parts = [self.advance(past, tokens[:5], 1)]
            parts += [self.advance(past, tokens[at : at + 1], 1) for at in (5, 6)]
            difference = (torch.cat(parts) - whole).norm() / whole.norm()
            self.cached = bool(difference <= limit)
        except (AttributeError, IndexError, KeyError, LookupError, RuntimeError, TypeError, ValueError):
            self.cached = False  # no cache we know how to pass back

    def close(self) -> None:
        self._model = None


def _batch(tokens: Sequence[int] | array[int]) -> Tensor:
    return torch.tensor([list(tokens)])


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype


def _cache_of(output: Any) -> tuple[str, Any]:
    for name in CACHE_NAMES:
        cache = getattr(output, name, None)
        if cache is not None:
            return name, cache
    raise LookupError("the model returns no cache")


class CompatRunner:
    """Runs plans sequence by sequence. Implements container.engine.step.Runner."""

    def __init__(self, plain: PlainModel, sampler: SlotSampler, score: Scorer, capacity: Capacity) -> None:
        assert not capacity.chunked_prefill, "a prompt must come whole"
        assert not capacity.prefix_cache, "nothing is shared between sequences"
        self._plain = plain
        self._sampler = sampler
        self._score = score
        self._capacity = replace(capacity, grammar=sampler.holds_grammars)
        self._slots = SlotTable()
        self._pasts: dict[int, Past] = {}

    def capacity(self) -> Capacity:
        return self._capacity

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; raises what the model raises."""
        for slot in plan.releases:
            self._pasts.pop(slot, None)
            self._sampler.release(slot)
        self._slots.apply(plan)
        for assignment in plan.assigns:
            assert assignment.cached_tokens == 0, "nothing is restored here"
            self._pasts[assignment.slot] = Past()
            self._sampler.assign(assignment)
        rows = plan_rows(plan)
        prepare(rows, self._sampler)
        parts = [self._advance(row) for row in rows]
        if not parts:
            return StepResult(plan.number)
        return step_result(plan, rows, torch.cat(parts), self._slots, self._sampler, self._score)

    def _advance(self, row: PlanRow) -> Tensor:
        past = self._pasts[row.slot]
        assert len(past.tokens) == row.start, "a row does not continue its sequence"
        return self._plain.advance(past, row.tokens, row.logits)

    def reset(self) -> None:
        self._pasts.clear()
        self._slots.clear()
        self._sampler.reset()

    def close(self) -> None:
        self.reset()
        self._plain.close()
