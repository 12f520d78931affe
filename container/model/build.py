"""From a model source and settings to a runner: load, probe, size, choose.

Owns: the order of starting up, the choice between native and compat, what is told about the model.
Must not know: processes, environment variables, HTTP.
Invariant: native only after both probes passed; otherwise compat, with the reason, or a refusal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from container.engine.step import Capacity, Runner
from container.model import probe, shape
from container.model.compat import CompatRunner, PlainModel
from container.model.grammar import GrammarCache
from container.model.kv_cache import KVCache, LayerShape
from container.model.load import LoadedModel, load, quiet, read_config
from container.model.masks import masks_over
from container.model.packed import PackedModel
from container.model.probe import Measured, ProbeFailed, ProbeReason
from container.model.runner import NativeRunner, Scorer, SlotSampler
from container.model.shape import RunnerConfig, Sizes
from container.model.source import ModelSource

LOGITS_BYTES: Final = (
    2**30
)  # prompt logprobs need a row of logits per position; more than this is not offered
FP32_BYTES: Final = 4


class ModelRefused(Exception):
    """The model fails the probe and compat is off."""

    def __init__(self, reason: ProbeReason) -> None:
        super().__init__(f"the model cannot run natively ({reason.value})\nhint: allow compat")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is worth telling about a loaded model; no content, no names of tensors."""

    runner: str  # native | compat
    reason: ProbeReason | None  # why not native
    architecture: str
    parameters: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    seconds: dict[str, float] = field(default_factory=dict)  # by phase of loading


class _Clock:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 3)


def build_runner(
    config: RunnerConfig,
    source: ModelSource,
    progress: Callable[[str], None],
    grammars: GrammarCache | None = None,
) -> tuple[Runner, ModelFacts]:
    """Return a runner for the model in `source`, and facts about it.

    With `grammars` (see container.model.grammar.over) sampling can be held to them, where they are available.
    Sets torch's thread count for the process. `progress` receives a short phrase per phase. Raises LoadError,
    SourceError, SizingError, and ModelRefused when only compat would do and it is off.
    """
    from container.model.sampler import Sampler, score

    def make_sampler(vocabulary: int) -> Sampler:
        return Sampler(vocabulary, masks_over(grammars, vocabulary, shape.physical_cores()))

    return assemble(config, source, progress, make_sampler, score)


def assemble(
    config: RunnerConfig,
    source: ModelSource,
    progress: Callable[[str], None],
    make_sampler: Callable[[int], SlotSampler],
    score: Scorer,
) -> tuple[Runner, ModelFacts]:
    """As build_runner, with the sampler given: a factory that takes the vocabulary, and a scorer."""
    clock = _Clock()
    torch.set_num_threads(shape.compute_threads(config.threads, shape.physical_cores()))
    dtype = shape.compute_dtype(config.dtype, shape.cpu_flags())
    reason: ProbeReason | None = None
    measured: Measured | None = None
    try:
        progress("checking structure")
        with clock.phase("probe_structure"):
            quiet()
            probe.probe_structure(read_config(source))
    except ProbeFailed as failure:
        reason = failure.reason
    with clock.phase("load"):
        loaded = load(source, dtype, lambda text: shape.wanted_tokens(text, config), progress)
    if reason is None:
        progress("comparing with the reference")
        with clock.phase("probe_weights"):
            try:
                measured = _probe_weights(loaded)
            except ProbeFailed as failure:
                reason = failure.reason
    wanted = shape.wanted_tokens(loaded.text_config, config)
    facts = ModelFacts(
        runner="compat" if measured is None else "native",
        reason=reason,
        architecture=loaded.architecture,
        parameters=loaded.parameters,
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=loaded.eos_token_ids,
        seconds=clock.seconds,
    )
    if measured is not None:
        sizes = shape.size(config, wanted, shape.kv_bytes_per_token(measured.layers, dtype))
        return _native(loaded, measured, sizes, config, make_sampler, score), facts
    assert reason is not None
    if not config.compat:
        raise ModelRefused(reason)
    with clock.phase("probe_compat"):
        runner = _compat(loaded, config, wanted, make_sampler, score)
    return runner, facts


def _probe_weights(loaded: LoadedModel) -> Measured:
    """Probe B: the real weights, before and after the hook; raises ProbeFailed."""
    text = loaded.text_config
    sequences = probe.probe_sequences(text.vocab_size)
    references = probe.reference_logits(loaded.model, sequences)
    probe.hooked(loaded.use_hook)
    return probe.compare(loaded.model, sequences, references, text.num_hidden_layers)


def _native(
    loaded: LoadedModel,
    measured: Measured,
    sizes: Sizes,
    config: RunnerConfig,
    make_sampler: Callable[[int], SlotSampler],
    score: Scorer,
) -> NativeRunner:
    kv = KVCache(measured.layers, next(loaded.model.parameters()).dtype, sizes.limits())
    capacity = _capacity(sizes, measured.vocabulary)
    capacity = replace(capacity, prefix_cache=config.prefix_cache)
    packed = PackedModel(loaded.model, kv)
    return NativeRunner(packed, make_sampler(measured.vocabulary), score, sizes, capacity)


def _capacity(sizes: Sizes, vocabulary: int) -> Capacity:
    return Capacity(
        blocks=sizes.blocks,
        block_tokens=sizes.block_tokens,
        slots=sizes.slots,
        step_tokens=sizes.step_tokens,
        sequence_tokens=sizes.sequence_tokens,
        vocabulary=vocabulary,
        prompt_logprobs=sizes.step_tokens * vocabulary * FP32_BYTES <= LOGITS_BYTES,
        resident_tokens=sizes.resident_tokens,
    )


def _compat(
    loaded: LoadedModel,
    config: RunnerConfig,
    wanted: int,
    make_sampler: Callable[[int], SlotSampler],
    score: Scorer,
) -> CompatRunner:
    loaded.use_reference()
    plain = PlainModel(loaded.model)
    plain.check(loaded.text_config.vocab_size)
    vocabulary = plain.vocabulary()
    dtype = next(loaded.model.parameters()).dtype
    token_bytes = shape.kv_bytes_per_token(_nominal_layers(loaded.text_config), dtype)
    sizes = shape.size(replace(config, prefix_cache=False), wanted, token_bytes)
    sizes = replace(sizes, step_tokens=max(sizes.step_tokens, sizes.sequence_tokens))
    capacity = _capacity(sizes, vocabulary)
    capacity = replace(capacity, prefix_cache=False, chunked_prefill=False, resident_tokens=None)
    return CompatRunner(plain, make_sampler(vocabulary), score, capacity)


def _nominal_layers(text: Any) -> list[LayerShape]:
    """Return K and V shapes by the configuration, for accounting where nothing can be measured."""
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(kv_heads, int):
        kv_heads = heads
    head_dim = getattr(text, "head_dim", None) or max(1, text.hidden_size // heads)
    return [LayerShape(kv_heads, head_dim, head_dim)] * text.num_hidden_layers
