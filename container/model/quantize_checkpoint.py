"""Checkpoints that come already quantized: unpacked where that is exact, else refused by name.

Owns: reading `quantization_config`, which methods are understood, the arithmetic back to dense weights.
Must not know: transformers, modules, which scheme the weights will be served in.
Invariant: every weight is handed out once, dense once it is read, whatever order its pieces come in; a piece
that never finds the rest is a refusal, not a silent loss. Nothing here names a tensor in an error.

Understood, each with one scale or many per weight:

    fp8                  weight e4m3, weight_scale_inv fp32 per block of 128 x 128 (DeepSeek V3)
    compressed-tensors   weight int8 or e4m3 with weight_scale (and weight_zero_point): whole, per output
                         channel, per group along the input or per block; formats naive, int and float
    none of the above    refused: gptq, awq and the like pack several weights into one word
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from container.model.source import ModelSource, SourceError, StoredTensor, read_json

CONFIG: Final = "config.json"
KEY: Final = "quantization_config"
OTHER_KEY: Final = "compression_config"  # what older compressed-tensors checkpoints call it
WEIGHT: Final = "weight"
SCALE_NAMES: Final = ("weight_scale_inv", "weight_scale")
ZERO_POINT: Final = "weight_zero_point"
# Scales of activations and of the KV cache: full-precision activations need none.
DROPPED: Final = frozenset(
    {"input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point"}
    | {"k_scale", "v_scale", "q_scale"}
)
REORDERED: Final = frozenset({"weight_g_idx"})  # groups that are no runs of inputs
STORED: Final = frozenset({torch.int8, torch.uint8, torch.float8_e4m3fn})
UNPAIRED: Final = STORED - {torch.uint8} | {torch.float8_e5m2}  # as anything but a `weight`, not understood
PLAIN_FORMATS: Final = frozenset({"naive-quantized", "int-quantized", "float-quantized", "dense"})
# Known by name and refused by it; whatever else a configuration names is not repeated.
REFUSED_METHODS: Final = frozenset(
    {"gptq", "awq", "bitsandbytes", "mxfp4", "fbgemm_fp8", "hqq", "quanto", "torchao", "eetq", "aqlm", "spqr"}
    | {"vptq", "higgs", "bitnet", "auto-round", "quark", "modelopt", "exl2", "marlin", "fp_quant", "sinq"}
)
REFUSED_FORMATS: Final = frozenset(
    {"pack-quantized", "marlin-24", "sparse-24-bitmask", "sparse-bitmask", "nvfp4-pack-quantized"}
    | {"mixed-precision", "mxfp4-pack-quantized"}
)


class CheckpointRefused(SourceError):
    """The checkpoint is quantized in a way that is not undone here."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the checkpoint is already quantized ({what})\nhint: give full-precision weights")


def full_precision(source: ModelSource, dtype: torch.dtype) -> ModelSource:
    """Return `source` itself where it is not quantized, else a source of the same model that is not.

    Weights are computed in fp32 and yielded in `dtype`. Raises CheckpointRefused, SourceError.
    """
    config = read_json(source, CONFIG)
    settings = None if config is None else config.get(KEY) or config.get(OTHER_KEY)
    if config is None or not settings:
        return source
    if not isinstance(settings, dict):
        raise SourceError(f"`{KEY}` is not a JSON object")
    scaling = _understood(settings)
    plain = {name: value for name, value in config.items() if name not in (KEY, OTHER_KEY)}
    return FullPrecisionSource(source, plain, scaling, dtype)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How scales belong to weights."""

    block: tuple[int, int] | None = None  # (outputs, inputs) per scale; None: the shapes tell
    offsets: bool = False  # some weights have a zero point


def _understood(settings: dict[str, Any]) -> Scaling:
    """Return how the weights are scaled; raises CheckpointRefused and SourceError."""
    method = settings.get("quant_method")
    if method == "fp8":
        return Scaling(_block(settings.get("weight_block_size")))
    if method == "compressed-tensors":
        return _compressed(settings)
    named = isinstance(method, str) and method in REFUSED_METHODS
    raise CheckpointRefused(f"`{method}`" if named else "by a method not known here")


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
        raise SourceError("the block of a scale is not two positive integers")
    return value[0], value[1]


def _compressed(settings: dict[str, Any]) -> Scaling:
    if settings.get("sparsity_config"):
        raise CheckpointRefused("`compressed-tensors` with sparsity")
    if settings.get("transform_config"):
        raise CheckpointRefused("`compressed-tensors` with transforms of activations")
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError("`config_groups` is not an object of objects")
    formats = [settings.get("format"), *(group.get("format") for group in groups.values())]
    for kind in (str(kind) for kind in formats if kind is not None):
        if kind not in PLAIN_FORMATS:
            named = f", `{kind}`" if kind in REFUSED_FORMATS else " in a format not known here"
            raise CheckpointRefused(f"`compressed-tensors`{named}")
    weights = [w for w in (group.get("weights") for group in groups.values()) if isinstance(w, dict)]
    blocks = {_block(w.get("block_structure")) for w in weights}
    if len(blocks) > 1:
        raise CheckpointRefused("`compressed-tensors` with several block sizes")
    return Scaling(blocks.pop() if blocks else None, any(w.get("symmetric") is False for w in weights))


@dataclass(slots=True)
class _Pieces:
    """What is stored of one layer's weight."""

    weight: StoredTensor | None = None
    scale: StoredTensor | None = None
    offset: StoredTensor | None = None


class FullPrecisionSource:
    """A model source whose weights are unpacked when they are read."""

    def __init__(
        self, source: ModelSource, config: dict[str, Any], scaling: Scaling, dtype: torch.dtype
    ) -> None:
        self._source = source
        self._config = json.dumps(config).encode()
        self._scaling = scaling
        self._dtype = dtype

    def file(self, name: str) -> bytes | None:
        return self._config if name == CONFIG else self._source.file(name)

    def weights_sha256(self) -> str | None:
        return self._source.weights_sha256()

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield every weight once; raises SourceError where a scale's weight never comes.

        Reading one raises SourceError where its scale is lacking or does not fit.
        """
        layers: dict[str, _Pieces] = {}
        for name, tensor in self._source.stored():
            layer, _, kind = name.rpartition(".")
            if kind in REORDERED:
                raise CheckpointRefused("in a layout not known here")
            if kind in DROPPED:
                continue
            pieces = layers.setdefault(layer, _Pieces())
            if kind in SCALE_NAMES:
                pieces.scale = tensor
            elif kind == ZERO_POINT:
                pieces.offset = tensor
            elif kind == WEIGHT:
                pieces.weight = tensor
            else:
                yield name, StoredTensor(tensor.shape, partial(_plain, tensor))
        for layer, pieces in layers.items():
            if pieces.weight is not None:
                dense = partial(self._dense, pieces.weight, pieces)
                yield f"{layer}.{WEIGHT}", StoredTensor(pieces.weight.shape, dense)
            elif pieces.scale is not None or pieces.offset is not None:
                raise SourceError("a quantized weight lacks its scale, or a scale its weight")

    def _dense(self, weight: StoredTensor, pieces: _Pieces) -> Tensor:
        """Return the weight in full precision."""
        packed = weight.read()
        if packed.dtype not in STORED and pieces.scale is None and pieces.offset is None:
            if packed.dtype in UNPAIRED:
                raise CheckpointRefused("in a layout not known here")
            return packed
        if pieces.scale is None or packed.dtype not in STORED:
            raise SourceError("a quantized weight lacks its scale, or a scale its weight")
        dense, block = packed.float(), self._scaling.block
        if pieces.offset is not None:
            dense = dense - spread(pieces.offset.read().float(), dense.shape, block)
        return dense.mul_(spread(pieces.scale.read().float(), dense.shape, block)).to(self._dtype)


def _plain(stored: StoredTensor) -> Tensor:
    """Return a tensor that has no scale; raises CheckpointRefused for one that needs it."""
    tensor = stored.read()
    if tensor.dtype in UNPAIRED:
        raise CheckpointRefused("in a layout not known here")
    return tensor


def spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """Return `scale` repeated to `shape` (out, in): one for all, per output, per group of inputs, or per
    `block` of (outputs, inputs), whose last one may be cut off. Raises SourceError where it does not fit.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if len(shape) != 2:
        raise SourceError("a quantized weight is no matrix")
    outputs, inputs = shape
    if block is not None:
        if scale.shape != (-(-outputs // block[0]), -(-inputs // block[1])):
            raise SourceError("a scale does not fit its weight")
        wide = scale.repeat_interleave(block[0], 0)[:outputs]
        return wide.repeat_interleave(block[1], 1)[:, :inputs]
    if scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if scale.dim() != 2 or scale.shape[0] != outputs or inputs % scale.shape[1]:
        raise SourceError("a scale does not fit its weight")
    return scale.repeat_interleave(inputs // scale.shape[1], 1)
