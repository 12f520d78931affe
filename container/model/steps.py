"""What is done to decoder layers between their parameters and the first token, and where they come from.

Owns: the order of fusing, quantizing and taking the reference; the choice between cutting and prepared parts.
Must not know: how fusion and quantization work (they are handed in), processes, requests.
Invariant: a model that is quantized while it loads never exists in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from container.model.folders import Folder
from container.model.load import LoadedModel, load
from container.model.shard import Finish, untouched
from container.model.shard_files import Recipe, load_shard
from container.model.source import ModelSource


@dataclass(frozen=True, slots=True)
class Prepared:
    """Parts made beforehand by `shard_files.save_shards`."""

    folder: Folder
    recipe: Recipe
    source_digest: str | None = None  # of the weights they must have been made from, when known


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """What is done to each decoder layer once it is loaded and cut; both steps may exchange its modules.

    Without quantization, layers are fused after the reference logits were taken, so that the probe judges the
    fusion too. With it, a layer is fused and quantized before the next one is kept; the reference is then the
    quantized model with transformers' own attention.
    """

    fuse: Finish = untouched
    quantize: Finish | None = None
    comparing: Callable[[], AbstractContextManager[object]] = nullcontext  # entered while logits are compared
    kernels: Callable[[], str] = (
        str  # what the steps chose and did, told after loading; the same on all ranks
    )
    prepared: Prepared | None = None

    def load(
        self,
        source: ModelSource,
        dtype: torch.dtype,
        sequence_tokens: Callable[[Any], int],
        progress: Callable[[str], None],
        rank: int = 0,
        size: int = 1,
    ) -> LoadedModel:
        """Return what `rank` of `size` holds; raises what `load` and `load_shard` raise."""
        if self.prepared is None:
            return load(
                source, dtype, sequence_tokens, progress, rank=rank, size=size, finish=self._while_loading
            )
        progress("reading weights")
        return load_shard(
            source,
            self.prepared.folder,
            rank,
            size,
            dtype,
            sequence_tokens,
            self.prepared.recipe,
            untouched if self.quantize is None else self.fuse,
            self.quantize or untouched,
            self.prepared.source_digest,
        )

    def _while_loading(self, layer: nn.Module) -> None:
        if self.quantize is not None:
            self.fuse(layer)
            self.quantize(layer)

    def after_reference(self, loaded: LoadedModel) -> None:
        """Fuse the layers of a model that is not quantized."""
        if self.quantize is None:
            for name in loaded.layout.layers:
                self.fuse(loaded.model.get_submodule(name))
