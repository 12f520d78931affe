"""From a model source and settings to a runner: load, probe, size, choose.

Owns: the order of starting up, the choice between native and compat, what is told about the model.
Must not know: processes, environment variables, HTTP.
Invariant: native only after both probes passed; otherwise compat, with the reason, or a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from container.engine.step import Runner
from container.kernels.attention import KVType
from container.model import device_format, device_start, division, fused, probe, shape, surgery
from container.model import parts as parts_made
from container.model.compat import CompatRunner, PlainModel
from container.model.facts import Clock, ModelFacts, ModelRefused
from container.model.folders import parts_of
from container.model.fused_model import KV_TYPES, page_token_bytes
from container.model.group import Group
from container.model.kv_cache import KVCache
from container.model.load import LoadedModel, empty_model, quiet, read_config
from container.model.packed import PackedModel
from container.model.positions import freeze_positions
from container.model.preparation import Preparation, compute_dtype, facts_of
from container.model.quantize_checkpoint import full_precision
from container.model.quantize_choose import Choice, Scheme
from container.model.replay import Measured, ProbeFailed, ProbeReason
from container.model.runner import NativeRunner, NoSampler, Scorer, SlotSampler, native_runner
from container.model.shape import RunnerConfig, Sizes
from container.model.source import ModelSource, source_sha256
from container.model.steps import LayerSteps, Prepared


def assemble(
    config: RunnerConfig,
    source: ModelSource,
    progress: Callable[[str], None],
    make_sampler: Callable[[int], SlotSampler],
    score: Scorer,
    group: Group | None = None,
    steps: LayerSteps | None = None,
) -> tuple[Runner, ModelFacts]:
    """As container.model.start.build_runner, with the sampler given: a factory that takes the vocabulary,
    and a scorer.

    `steps` stand in for those that the settings ask for (parts prepared beforehand).
    """
    start = _Start(config, source, progress, group, steps)
    if group is not None and group.size > 1:
        return start.rank(make_sampler, score, group)
    return start.alone(make_sampler, score)


class _Start:
    """One start of a model: the phases in their order, alone or as one of several ranks."""

    def __init__(
        self,
        config: RunnerConfig,
        source: ModelSource,
        progress: Callable[[str], None],
        group: Group | None,
        steps: LayerSteps | None,
    ) -> None:
        self._config = config
        self._progress = progress
        self._clock = Clock()
        self._given = steps
        self._given_first = (config, source)
        self._together = group is not None and group.size > 1
        self._device = None if self._together else device_start.found()
        self._form = self._form_on_device(source)
        on_device = self._form is not None and config.dtype == "auto"
        self._settle(replace(config, dtype="bfloat16") if on_device else config, source)
        torch.set_num_threads(division.threads(config, group.size if group is not None else 1))
        quiet()

    def alone(self, make_sampler: Callable[[int], SlotSampler], score: Scorer) -> tuple[Runner, ModelFacts]:
        """Return the runner of a model that one process holds."""
        served = self._on_device(make_sampler, score)
        if served is not None:
            return served
        if self._form is not None:  # it did not give its own logits there
            self._settle(*self._given_first)
        prepared, loaded = self._load(surgery.parts(self._config.surgery))
        fused_runner = self._fused(prepared, loaded, make_sampler, score)
        if fused_runner is not None:
            return fused_runner, self._facts(loaded, None, prepared, operators="fused")
        known = self._structure()
        measured, reason = self._judge(prepared, loaded, known)
        if measured is None and prepared.fused_unjudged:
            # compat runs the model as it is
            prepared, loaded = self._load(frozenset())
            measured, reason = self._judge(prepared, loaded, known)
        facts = self._facts(loaded, reason, prepared)
        if measured is not None:
            return self._native(loaded, measured, make_sampler, score), facts
        assert reason is not None
        if not self._config.compat:
            raise ModelRefused(reason)
        with self._clock.phase("probe_compat"):
            wanted = self._wanted(loaded.text_config)
            runner = _compat(loaded, self._config, wanted, make_sampler, score)
        return runner, facts

    def _structure(self) -> ProbeReason | None:
        """Return why a model built like this cannot run natively, None when it may."""
        self._progress("checking structure")
        try:
            with self._clock.phase("probe_structure"):
                probe.probe_structure(read_config(self._source))
        except ProbeFailed as failure:
            return failure.reason
        return None

    def _fused(
        self,
        prepared: Preparation,
        loaded: LoadedModel,
        make_sampler: Callable[[int], SlotSampler],
        score: Scorer,
    ) -> NativeRunner | None:
        """Return a runner on the fused operators, None where the model is not made for them.

        What they compute is compared with the model itself, so that no other probe is needed.
        """
        if prepared.native is None:
            return None
        kv_type = KV_TYPES[self._config.kv_dtype]
        self._progress("comparing with the reference")
        with self._clock.phase("fuse"):
            taken = fused.fuse(loaded, partial(self._freeze, loaded, kv_type), prepared.native)
        if taken is None:
            return None
        if not taken.finite:
            raise prepared.overflow()
        sizes = self._sizes(taken.measured, self._wanted(loaded.text_config), kv_type=kv_type)
        packed = taken.model(sizes.limits(), kv_type)
        vocabulary = taken.measured.vocabulary
        return native_runner(packed, make_sampler(vocabulary), score, sizes, vocabulary, self._config)

    def _settle(self, config: RunnerConfig, source: ModelSource) -> None:
        """Take over `config` with what follows from it."""
        self._config = config
        self._dtype = compute_dtype(config.dtype, config.quantize, source, alone=not self._together)
        self._parts = parts_of(config, source)
        self._source = full_precision(source, self._dtype)

    def _form_on_device(self, source: ModelSource) -> Choice | None:
        """Return the form of the products on the accelerator, None where the model is not served from one."""
        if self._device is None:
            return None
        config = read_config(full_precision(source, torch.bfloat16))
        if not device_start.fits(empty_model(config, torch.bfloat16)):
            return None
        facts = facts_of(config, torch.bfloat16)
        return device_format.chosen(self._device, self._config.quantize, facts)

    def _on_device(
        self, make_sampler: Callable[[int], SlotSampler], score: Scorer
    ) -> tuple[NativeRunner, ModelFacts] | None:
        """Return a runner on an accelerator, None where there is none or the model is not made for it."""
        device, chosen = self._device, self._form
        if device is None or chosen is None:
            return None
        prepared, loaded = self._load(frozenset(), setting=Scheme.NONE.value)
        wanted = self._wanted(loaded.text_config)

        def freeze(measured: Measured) -> int:
            sized = device_start.sizes(device, self._config, measured, wanted, self._dtype)
            freeze_positions(loaded.model, sized.sequence_tokens)
            return sized.sequence_tokens

        self._progress("comparing with the reference")
        with self._clock.phase("place"):
            placed = device_start.place(device, loaded, freeze, device_format.PACKS[chosen.scheme])
        if placed is None:
            return None
        sized = placed.sizes(self._config, wanted)
        self._progress("capturing")
        with self._clock.phase("capture"):
            runner = placed.runner(sized, self._config, make_sampler(placed.measured.vocabulary), score)
        facts = self._facts(loaded, None, prepared, operators="device")
        return runner, replace(facts, quantize=chosen.scheme.value, quantize_reason=chosen.reason)

    def _freeze(self, loaded: LoadedModel, kv_type: KVType | None, measured: Measured) -> int:
        """Freeze positions for the longest sequence that memory allows, and return its tokens."""
        sizes = self._sizes(measured, self._wanted(loaded.text_config), kv_type=kv_type)
        freeze_positions(loaded.model, sizes.sequence_tokens)
        return sizes.sequence_tokens

    def rank(
        self, make_sampler: Callable[[int], SlotSampler], score: Scorer, group: Group
    ) -> tuple[Runner, ModelFacts]:
        """Return this rank's runner of a model that `group` holds together."""
        config, clock = self._config, self._clock
        try:
            self._progress("checking structure")
            with clock.phase("probe_structure"):
                probe.probe_structure(read_config(self._source))
                division.probe_division(read_config(self._source), group)
            prepared, loaded = self._load(surgery.parts(config.surgery), group)
            steps = self._steps(prepared)
            self._progress("comparing with the reference")
            with clock.phase("probe_weights"), steps.comparing():
                measured = division.probe_shards(loaded, group, lambda: steps.after_reference(loaded))
        except ProbeFailed as failure:
            raise division.refuse(failure, group.size) from None
        wanted = self._wanted(loaded.text_config)
        sizes = self._sizes(measured, wanted, division.budget_bytes(config, group))
        sizes = replace(sizes, blocks=group.minimum(sizes.blocks))
        division.check_positions_kept(loaded, wanted, sizes)
        division.agree(config, loaded, measured, sizes, steps.kernels(), group)
        sampler = make_sampler if group.rank == 0 else _no_sampler
        runner = _native(loaded, measured, sizes, config, sampler, score, group)
        return runner, self._facts(loaded, None, prepared)

    def _steps(self, prepared: Preparation) -> LayerSteps:
        return self._given or prepared.steps

    def _load(
        self, parts: frozenset[surgery.Part], group: Group | None = None, *, setting: str | None = None
    ) -> tuple[Preparation, LoadedModel]:
        facts = facts_of(read_config(self._source), self._dtype)
        prepared = Preparation(setting or self._config.quantize, facts, parts, together=self._together)
        place = () if group is None else (group.rank, group.size)
        steps = self._with_parts(prepared, 1 if group is None else group.size)
        with self._clock.phase("load"):
            loaded = steps.load(self._source, self._dtype, self._wanted, self._progress, *place)
        if self._given is None:
            prepared.complete(loaded.model)
            prepared.adopt(loaded.model, torch.get_num_threads())
        return prepared, loaded

    def _with_parts(self, prepared: Preparation, size: int) -> LayerSteps:
        """Return the steps, on parts made beforehand where there are any for these choices."""
        steps = self._steps(prepared)
        folder = parts_made.found(self._parts, size, prepared.choice.scheme)
        if folder is None:
            return steps
        digest = source_sha256(self._source)
        return replace(steps, prepared=Prepared(folder, prepared.recipe, digest))

    def _judge(
        self, prepared: Preparation, loaded: LoadedModel, known: ProbeReason | None
    ) -> tuple[Measured | None, ProbeReason | None]:
        """Return what was measured, or why the model is not native; `known` is a reason found before."""
        self._progress("comparing with the reference")
        steps = self._steps(prepared)
        try:
            with self._clock.phase("probe_weights"):
                prepared.check_finite(loaded.model, loaded.text_config.vocab_size)
                if known is not None:
                    return None, known
                with steps.comparing():
                    return prepared.judge(loaded, lambda: steps.after_reference(loaded)), None
        except ProbeFailed as failure:
            return None, failure.reason

    def _wanted(self, text: Any) -> int:
        return shape.wanted_tokens(*shape.reach(text), self._config)

    def _sizes(
        self,
        measured: Measured,
        wanted: int,
        budget_bytes: int | None = None,
        *,
        kv_type: KVType | None = None,
    ) -> Sizes:
        """Return what fits; `kv_type` is that of pages, None stands for slabs."""
        if kv_type is not None:
            page = page_token_bytes(measured.layers, kv_type, self._config.block_tokens)
            return shape.size(self._config, wanted, page, budget_bytes, paged=True)
        shape.check_kv_dtype(self._config.kv_dtype, self._dtype)
        windows = shape.kv_bytes_by_window(measured.layers, self._dtype)
        token_bytes = shape.kv_bytes_per_token(measured.layers, self._dtype)
        return shape.size(self._config, wanted, token_bytes, budget_bytes, windows=windows)

    def _native(
        self,
        loaded: LoadedModel,
        measured: Measured,
        make_sampler: Callable[[int], SlotSampler],
        score: Scorer,
    ) -> NativeRunner:
        self._freeze(loaded, None, measured)
        sizes = self._sizes(measured, self._wanted(loaded.text_config))
        return _native(loaded, measured, sizes, self._config, make_sampler, score)

    def _facts(
        self,
        loaded: LoadedModel,
        reason: ProbeReason | None,
        prepared: Preparation,
        *,
        operators: str | None = None,
    ) -> ModelFacts:
        return ModelFacts(
            operators=operators or ("torch" if prepared.native is None else "products"),
            runner="native" if reason is None else "compat",
            reason=reason,
            architecture=loaded.architecture,
            parameters=loaded.parameters,
            dtype=str(self._dtype).removeprefix("torch."),
            eos_token_ids=loaded.eos_token_ids,
            seconds=self._clock.seconds,
            fused=prepared.fused,
            quantize=prepared.choice.scheme.value,
            quantize_reason=prepared.choice.reason,
            quantized=prepared.report.describe(),
        )


def _no_sampler(vocabulary: int) -> SlotSampler:  # noqa: ARG001 - a factory like any other
    return NoSampler()


def _native(
    loaded: LoadedModel,
    measured: Measured,
    sizes: Sizes,
    config: RunnerConfig,
    make_sampler: Callable[[int], SlotSampler],
    score: Scorer,
    group: Group | None = None,
) -> NativeRunner:
    kv = KVCache(measured.layers, next(loaded.model.parameters()).dtype, sizes.limits())
    packed = PackedModel(loaded.model, kv, group)
    sampler = make_sampler(measured.vocabulary)
    return native_runner(packed, sampler, score, sizes, measured.vocabulary, config)


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
    token_bytes = shape.kv_bytes_per_token(shape.nominal_layers(loaded.text_config), dtype)
    sizes = shape.size(replace(config, prefix_cache=False), wanted, token_bytes)
    sizes = replace(sizes, step_tokens=max(sizes.step_tokens, sizes.sequence_tokens))
    capacity = sizes.capacity(vocabulary)
    capacity = replace(
        capacity, prefix_cache=False, chunked_prefill=False, resident_tokens=None, draft_tokens=0
    )
    return CompatRunner(plain, make_sampler(vocabulary), score, capacity)
