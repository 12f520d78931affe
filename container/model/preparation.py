"""What is done to a model's layers while it loads: which scheme and which surgery, chosen once.

Owns: the choice of a quantization from facts known before any weight is read, the steps that carry it out.
Must not know: how a scheme or a surgery computes, processes, requests.
Invariant: what is quantized is quantized layer by layer while it loads, so that the model never exists in
full precision; a model leaves quantized as chosen, or the start stops with a reason and a next move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from container.kernels.operators import Native, native_operators
from container.model import probe, shape, surgery
from container.model.load import LoadedModel, empty_model, read_config
from container.model.quantize import Report, quantize
from container.model.quantize_checkpoint import full_precision
from container.model.quantize_choose import IN_BLOCKS, Facts, QuantizeRefused, Scheme, choose
from container.model.quantize_modules import plain_activations
from container.model.quantize_native import adopt
from container.model.replay import Measured, ProbeFailed, ProbeReason, probe_sequences
from container.model.shard import untouched
from container.model.shard_files import Recipe
from container.model.source import ModelSource
from container.model.steps import LayerSteps


class Preparation:
    """One start's choices; `steps` is what the loader is given."""

    def __init__(
        self, setting: str, facts: Facts, parts: frozenset[surgery.Part], *, together: bool = False
    ) -> None:
        """Choose by `setting`; `together` is for one of several ranks. Raises QuantizeRefused."""
        self.choice = choose(setting, facts)
        self.report = Report(self.choice.scheme)
        self.fused: dict[str, int] = {}
        self.native: Native | None = None  # operators that hold the model's blocks
        self._parts = parts
        # Alone and unquantized, surgery waits for the probe, which can undo it.
        self.judged_later = not together and not self.quantizes
        fuses = bool(parts) and not self.judged_later
        self.steps = LayerSteps(
            fuse=self._fuse if fuses else untouched,
            quantize=self._quantize if self.quantizes else None,
            comparing=plain_activations,
            kernels=self._summary,
        )

    @property
    def recipe(self) -> Recipe:
        """What is done to layers before the probe sees them, in the words parts are compared by."""
        fused = sorted(part.value for part in self._parts) if self.quantizes else []
        return Recipe(self.choice.scheme.value, tuple(fused))

    @property
    def quantizes(self) -> bool:
        return self.choice.scheme is not Scheme.NONE

    @property
    def fused_unjudged(self) -> bool:
        """True when surgery was done before the probe could see the model without it."""
        return bool(self.fused) and not self.judged_later

    def _fuse(self, layer: nn.Module) -> None:
        fused = surgery.fuse(layer, self._parts)
        fused.commit()
        for part, count in fused.counts.items():
            self.fused[part.value] = self.fused.get(part.value, 0) + count

    def _quantize(self, layer: nn.Module) -> None:
        self.report.add(quantize(layer, self.choice.scheme))

    def _summary(self) -> str:
        return f"{self.choice.scheme.value} {self.report.linears} {sorted(self.fused.items())}"

    def check_finite(self, model: Any, vocabulary: int) -> None:
        """Raise QuantizeRefused where activations overflow; for a rank that is alone.

        Raises ProbeFailed where surgery broke the model.
        """
        if not self.quantizes:
            return
        try:
            logits = probe.reference_logits(model, probe_sequences(vocabulary))
        except AssertionError:  # what was fused turned out not to share its input
            raise ProbeFailed(ProbeReason.BUILD_ERROR) from None
        if not all(rows.isfinite().all() for rows in logits):
            raise self.overflow()

    def overflow(self) -> QuantizeRefused:
        """Return the refusal of a scheme under which results are not finite."""
        scheme = self.choice.scheme.value
        return QuantizeRefused(f"activations overflow under `{scheme}`\nhint: choose `none`")

    def complete(self, model: Any) -> None:
        """Quantize what lies outside the layers; raises QuantizeRefused where the scheme fits nothing."""
        if not self.quantizes:
            return
        self.report.left.clear()  # met again on this walk
        self._quantize(model)
        if self.report.nothing_done:
            scheme = self.choice.scheme.value
            raise QuantizeRefused(f"`{scheme}` fits no layer of this model\nhint: choose `none`")

    def adopt(self, model: Any, threads: int) -> None:
        """Give weights in blocks to the native operators, where there are any."""
        if self.choice.scheme in IN_BLOCKS and native_operators():
            self.native = Native(threads)
            adopt(model, self.native)

    def judge(self, loaded: LoadedModel, after_reference: Callable[[], None]) -> Measured:
        """Probe B: the real weights, before and after hook and surgery; raises ProbeFailed.

        `after_reference` is called between the two. A model that fails with surgery is judged again without.
        """
        text = loaded.text_config
        layers = text.num_hidden_layers
        sequences = probe_sequences(text.vocab_size)
        references = probe.reference_logits(loaded.model, sequences)
        after_reference()
        probe.hooked(loaded.use_hook)
        measured, fused = surgery.guarded(
            loaded.model,
            self._parts if self.judged_later else frozenset(),
            trial=lambda: probe.measure(loaded.model, layers),
            judge=lambda: probe.compare(loaded.model, sequences, references, layers),
            failure=ProbeFailed,
        )
        self.fused = fused or self.fused
        return measured


def compute_dtype(setting: str, quantize: str, source: ModelSource, *, alone: bool) -> torch.dtype:
    """Return the dtype to compute in; raises SizingError, LoadError, SourceError and QuantizeRefused.

    The fused operators, which serve weights in blocks `alone`, compute in float32 wherever they run. `auto`
    follows them: in bfloat16 the modules they are compared with would round more than they may differ.
    """
    dtype = shape.compute_dtype(setting, shape.cpu_flags())
    if setting != "auto" or dtype is torch.float32 or not alone or not native_operators():
        return dtype
    facts = facts_of(read_config(full_precision(source, dtype)), dtype)
    return torch.float32 if choose(quantize, facts).scheme in IN_BLOCKS else dtype


def facts_of(config: Any, dtype: torch.dtype) -> Facts:
    """Return what the choice depends on, before any weight is read; raises LoadError.

    Sizes are those of an empty copy of the model.
    """
    model = empty_model(config, dtype)
    parameters = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    embedded = {
        id(p): p.nbytes for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = model.get_output_embeddings()
    heads = {} if head is None else {id(p): p.nbytes for p in head.parameters()}
    return Facts(
        device="cpu",
        capability=None,
        flags=shape.cpu_flags(),
        memory_bytes=shape.memory_limit_bytes(),
        model_bytes=sum(parameters.values()),
        kept_bytes=sum((embedded | heads).values()),
        head_bytes=sum(heads.values()),
        head_tied=not embedded.keys().isdisjoint(heads),
        weight_bytes=dtype.itemsize,
        block_kernel=native_operators(),
    )
