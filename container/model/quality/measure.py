"""A quantized model beside the unquantized one: how far its predictions stray, and what it saves.

Owns: the metrics, the order of measuring, opening one model per variant.
Must not know: files of the report, how a scheme quantizes.
Invariant: both models run the path that serves (packed, through our attention) on the same token windows; a
variant that cannot be opened is a row with its reason, never a missing row.

    KL     sum over the vocabulary of P (log P - log Q), P the reference's prediction, in nats, per position
    top-1  share of positions where both find the same token likeliest
    speed  decode steps of both models in turn, the ratio of medians: a machine's drift hits both alike
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from container.model.facts import ModelRefused
from container.model.load import LoadError
from container.model.quantize_choose import QuantizeRefused
from container.model.rows import PackedRow
from container.model.runner import NativeRunner, StepModel
from container.model.shape import RunnerConfig, SizingError
from container.model.source import ModelSource
from container.model.start import build_runner

CHUNK_ROWS: Final = 64  # positions compared at once: bounds the float64 copies of their logits
DECODE_BATCHES: Final = (1, 8)
DECODE_CONTEXT: Final = 64  # tokens each sequence holds while decoding is timed
TIMED_STEPS: Final = 7


class NotNative(Exception):
    """The model runs on compat, which is never quantized."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold the weights."""

    name: str
    quantize: str = "none"
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Quality:
    """Predictions of a variant against the reference's, over all windows."""

    positions: int
    perplexity: float
    kl_mean: float  # nats per token
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report; `refused` says why there is nothing else in it."""

    variant: str
    quality: Quality | None = None
    weight_bytes: int | None = None
    prefill_speedup: float | None = None  # reference's seconds over the variant's, same windows
    decode_speedup: dict[int, float] | None = None  # by batch size
    refused: str | None = None


class Opened:
    """A model ready to be asked for logits."""

    def __init__(self, runner: NativeRunner, dtype: str, architecture: str, parameters: int) -> None:
        self._runner = runner
        self.dtype = dtype
        self.architecture = architecture
        self.parameters = parameters

    @property
    def packed(self) -> StepModel:
        return self._runner.packed

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return self.packed.weight_bytes

    def window_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return (tokens, vocabulary) float32 logits of one sequence computed alone, in one step."""
        logits = self.packed.logits([PackedRow(0, 0, tokens, range(len(tokens)))])
        assert logits is not None, "a rank that is alone has logits"
        self.packed.kv.release(0)
        return torch.as_tensor(logits)

    def close(self) -> None:
        self._runner.close()


def open_variant(
    source: ModelSource,
    variant: Variant,
    window_tokens: int,
    threads: int | None,
    progress: Callable[[str], None],
) -> Opened:
    """Return the model of `source` held as `variant` says; raises what build_runner raises, and NotNative."""
    longest = max(window_tokens, DECODE_CONTEXT + TIMED_STEPS)
    config = RunnerConfig(
        sequence_tokens=longest,
        running_limit=max(DECODE_BATCHES),
        step_tokens=longest,
        prefix_cache=False,
        compat=True,
        dtype=variant.dtype,
        quantize=variant.quantize,
        threads=threads,
    )
    runner, facts = build_runner(config, source, progress)
    if not isinstance(runner, NativeRunner):
        raise NotNative(f"the model runs on compat ({facts.reason})")
    return Opened(runner, facts.dtype, facts.architecture, facts.parameters)


def measure(
    source: ModelSource,
    reference: Opened,
    variants: Sequence[Variant],
    windows: Sequence[Sequence[int]],
    threads: int | None,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """Yield one row per variant, each against `reference`. Holds two models at a time."""
    for variant in variants:
        progress(variant.name)
        try:
            opened = open_variant(source, variant, len(windows[0]), threads, lambda _: None)
        except (SizingError, LoadError, ModelRefused, NotNative, QuantizeRefused) as error:
            yield Row(variant.name, refused=str(error).splitlines()[0])
            continue
        try:
            quality, prefill = _quality(reference, opened, windows)
            decode = {batch: _decode_speedup(reference, opened, batch) for batch in DECODE_BATCHES}
            yield Row(variant.name, quality, opened.weight_bytes, prefill, decode)
        finally:
            opened.close()


def reference_row(reference: Opened, windows: Sequence[Sequence[int]], name: str) -> Row:
    """Return the row of the reference itself: its perplexity and size; it agrees with itself."""
    losses: list[Tensor] = []
    for window in windows:
        losses.append(_losses(reference.window_logits(window), window))
    perplexity = math.exp(float(torch.cat(losses).mean()))
    positions = sum(len(window) for window in windows)
    quality = Quality(positions, perplexity, 0.0, 0.0, 1.0)
    return Row(name, quality, reference.weight_bytes, 1.0, dict.fromkeys(DECODE_BATCHES, 1.0))


def _quality(reference: Opened, opened: Opened, windows: Sequence[Sequence[int]]) -> tuple[Quality, float]:
    divergences: list[Tensor] = []
    losses: list[Tensor] = []
    agreed = 0
    spent = {"reference": 0.0, "variant": 0.0}
    for window in windows:
        with _adding(spent, "reference"):
            expected = reference.window_logits(window)
        with _adding(spent, "variant"):
            found = opened.window_logits(window)
        losses.append(_losses(found, window))
        divergences.append(divergence(expected, found))
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
    all_kl = torch.cat(divergences)
    quality = Quality(
        positions=len(all_kl),
        perplexity=math.exp(float(torch.cat(losses).mean())),
        kl_mean=float(all_kl.mean()),
        kl_p99=float(all_kl.quantile(0.99)),
        top1_agreement=agreed / len(all_kl),
    )
    return quality, spent["reference"] / spent["variant"]


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the KL divergence of each row (rows,) float64, in nats, of (rows, vocabulary) logits."""
    parts = []
    for first in range(0, len(expected), CHUNK_ROWS):
        log_p = torch.log_softmax(expected[first : first + CHUNK_ROWS].double(), -1)
        log_q = torch.log_softmax(found[first : first + CHUNK_ROWS].double(), -1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def _losses(logits: Tensor, window: Sequence[int]) -> Tensor:
    """Return -log p of each token after the first (tokens - 1,), in nats."""
    targets = torch.tensor(window[1:])
    return torch.nn.functional.cross_entropy(logits[:-1].float(), targets, reduction="none")


@contextmanager
def _adding(spent: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - begun


def _decode_speedup(reference: Opened, opened: Opened, batch: int) -> float:
    """Return the reference's median decode step over the variant's, steps taken in turn."""
    models = (reference, opened)
    taken: tuple[list[float], list[float]] = ([], [])
    for model in models:
        rows = [PackedRow(slot, 0, [1] * DECODE_CONTEXT) for slot in range(batch)]
        for row in rows:  # one by one: a step's budget is sized for one window
            model.packed.logits([row])
    for step in range(TIMED_STEPS):
        for model, times in zip(models, taken, strict=True):
            rows = [PackedRow(slot, DECODE_CONTEXT + step, [1], (0,)) for slot in range(batch)]
            begun = time.perf_counter()
            model.packed.logits(rows)
            times.append(time.perf_counter() - begun)
    for model in models:
        for slot in range(batch):
            model.packed.kv.release(slot)
    return statistics.median(taken[0]) / statistics.median(taken[1])
