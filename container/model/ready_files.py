"""A decoder as it runs, made beforehand: every weight in the operators' own layout, and what it must answer.

Owns: the two files, their names and bounds, writing them, reading them whole or not at all.
Must not know: transformers, how a decoder computes, where the folder lies.
Invariant: what `read` returns has the shapes that its manifest says and the bytes that were written; the
operators trust it. A part of another arrangement is another form, never a guess.

    DIRECTORY/   manifest.json   decoder.safetensors

    embedding                    (vocabulary, hidden) float16 where that loses nothing, else float32
    last_norm                    (hidden,) float32
    cosines, sines               (positions, rotated / 2) float32
    head.*                       values int8, scales float16, bias float32 where there is one; of int4 blocks
                                 values uint8, and lows float16
    layers.N.qkv.* output.* gate_up.* down.*    as the head, joined as container.kernels.decoder says
    layers.N.attention_norm, mlp_norm, query_norm, key_norm       float32
    reference.N                  (tokens, vocabulary) float32: the logits of probe sequence N
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from container.kernels.attention import AttentionShape
from container.kernels.block_weight import ARRANGEMENT, BLOCK, ArrangedBlocks, padded
from container.kernels.decoder import Gate, Layer, Weights
from container.kernels.memory import Floats, empty
from container.model.errors import LoadError
from container.model.folders import Arrays, Folder
from container.model.source import file_sha256

MANIFEST: Final = "manifest.json"
TENSORS: Final = "decoder.safetensors"
FORMAT: Final = 1
MAX_MANIFEST_BYTES: Final = 1024 * 1024  # a line per layer and a few facts
MAX_LAYERS: Final = 1024
NORMS: Final = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
MATRICES: Final = ("qkv", "output", "gate_up", "down")
OTHER: Final = "a ready decoder holds a tensor of another shape or kind than its manifest says"

Array = npt.NDArray[Any]


class NotReady(LoadError):
    """The files are not those of a decoder for this start; the text names what differs, never a tensor."""


class Attention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's attention, as container.kernels.attention.AttentionShape."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of the model unquantized, in float32: what the choice of a scheme depends on."""

    model_bytes: int
    kept_bytes: int
    head_bytes: int
    head_tied: bool


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known of a ready decoder beside its tensors."""

    format: int
    arrangement: int
    source_sha256: str
    tensors_sha256: str
    architecture: str
    parameters: int
    quantized: str  # what was quantized and what was left, in counts
    eos_token_ids: tuple[int, ...]
    default_tokens: int
    longest_tokens: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: tuple[Attention, ...]
    gate: int
    epsilon: float
    rotated: int  # of each head's elements
    positions: int
    sizes: Sizes
    probe: tuple[tuple[int, ...], ...]  # token ids


@dataclass(frozen=True, slots=True)
class Ready:
    """A decoder with rotations for all positions that it may serve."""

    manifest: Manifest
    weights: Weights
    references: Sequence[Floats]


def write(
    folder: Path,
    manifest: Manifest,
    weights: Weights,
    references: Sequence[Floats],
) -> Manifest:
    """Write both files into `folder`, the manifest last; return it with the tensors' digest."""
    tensors: dict[str, Array] = {name: getattr(weights, name) for name in ("last_norm", "cosines", "sines")}
    with np.errstate(over="ignore"):  # to infinity, which is not equal
        half = weights.embedding.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), weights.embedding)
    tensors["embedding"] = half if exact else weights.embedding
    tensors |= dict(_parts("head", weights.head))
    for number, layer in enumerate(weights.layers):
        for name in MATRICES:
            tensors |= dict(_parts(f"layers.{number}.{name}", getattr(layer, name)))
        for name in NORMS:
            norm = getattr(layer, name)
            if norm is not None:
                tensors[f"layers.{number}.{name}"] = norm
    tensors |= {f"reference.{number}": logits for number, logits in enumerate(references)}
    save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, folder / TENSORS)
    manifest = msgspec.structs.replace(manifest, tensors_sha256=file_sha256(folder / TENSORS))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest


def _parts(name: str, weight: ArrangedBlocks) -> Iterator[tuple[str, Array]]:
    yield f"{name}.values", weight.values
    yield f"{name}.scales", weight.scales
    if weight.bias is not None:
        yield f"{name}.bias", weight.bias
    if weight.lows is not None:
        yield f"{name}.lows", weight.lows


def read_manifest(folder: Folder) -> Manifest | None:
    """Return the manifest in `folder`, None where there is none of this format; raises NotReady."""
    try:
        raw = folder.file(MANIFEST, MAX_MANIFEST_BYTES)
        if raw is None or msgspec.json.decode(raw, type=_Form) != _Form(FORMAT, ARRANGEMENT):
            return None
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, RecursionError):
        raise NotReady("a ready decoder has no readable manifest") from None
    reach = max(manifest.longest_tokens, manifest.default_tokens)
    if (
        not 0 < len(manifest.layers) <= MAX_LAYERS
        or reach > manifest.positions
        or manifest.gate not in {gate.value for gate in Gate}
    ):
        raise NotReady("a ready decoder's manifest describes no decoder")
    return manifest


class _Form(msgspec.Struct, frozen=True):
    format: int
    arrangement: int


def read(folder: Folder, manifest: Manifest) -> Ready:
    """Return the decoder in memory of its own; raises NotReady, SourceError."""
    if not folder.proves(TENSORS, manifest.tensors_sha256):
        raise NotReady("a ready decoder's tensors are missing or not those its manifest names")
    return _Reading(folder.arrays(TENSORS), manifest).ready()


class _Reading:
    """One reading of the tensors, each with the shape that the manifest makes it have."""

    def __init__(self, arrays: Arrays, manifest: Manifest) -> None:
        self._manifest = manifest
        self._arrays = arrays
        self._left = arrays.names()

    def ready(self) -> Ready:
        manifest = self._manifest
        hidden, vocabulary = manifest.hidden, manifest.vocabulary
        table = (manifest.positions, manifest.rotated // 2)
        layers = [self._layer(number, each) for number, each in enumerate(manifest.layers)]
        weights = Weights(
            layers=layers,
            embedding=self._embedding(vocabulary, hidden),
            last_norm=self._vector("last_norm", hidden),
            head=self._matrix("head", vocabulary, hidden),
            cosines=self._tensor("cosines", table, np.float32),
            sines=self._tensor("sines", table, np.float32),
            epsilon=manifest.epsilon,
            gate=Gate(manifest.gate),
        )
        references = [
            self._tensor(f"reference.{number}", (len(tokens), vocabulary), np.float32)
            for number, tokens in enumerate(manifest.probe)
        ]
        if self._left:
            raise NotReady("a ready decoder holds more tensors than its manifest describes")
        return Ready(manifest, weights, references)

    def _layer(self, number: int, each: Attention) -> Layer:
        hidden, intermediate = self._manifest.hidden, self._manifest.intermediate
        at = f"layers.{number}"
        self._arrays.let_go()  # of the layer before
        try:
            shape = AttentionShape(each.heads, each.kv_heads, each.dim, each.scale, each.window)
        except ValueError:
            raise NotReady("a ready decoder's manifest describes no decoder") from None
        inner, width = each.heads * each.dim, (each.heads + 2 * each.kv_heads) * each.dim
        return Layer(
            attention=shape,
            attention_norm=self._vector(f"{at}.attention_norm", hidden),
            mlp_norm=self._vector(f"{at}.mlp_norm", hidden),
            query_norm=self._optional(f"{at}.query_norm", each.dim),
            key_norm=self._optional(f"{at}.key_norm", each.dim),
            qkv=self._matrix(f"{at}.qkv", width, hidden),
            output=self._matrix(f"{at}.output", hidden, inner),
            gate_up=self._matrix(f"{at}.gate_up", 2 * intermediate, hidden),
            down=self._matrix(f"{at}.down", hidden, intermediate),
        )

    def _embedding(self, vocabulary: int, hidden: int) -> Floats:
        """Return the embedding in float32, however it is stored."""
        stored = self._tensor("embedding", (vocabulary, hidden), np.float16, np.float32)
        if stored.dtype == np.float32:
            return stored
        whole: Floats = empty(stored.shape)
        whole[...] = stored
        return whole

    def _matrix(self, name: str, outputs: int, inputs: int) -> ArrangedBlocks:
        count = padded(outputs) * inputs
        if inputs % BLOCK:
            raise NotReady("a ready decoder's manifest describes no decoder")
        int4 = f"{name}.lows" in self._left
        values = (
            (f"{name}.values", (count // 2,), np.uint8) if int4 else (f"{name}.values", (count,), np.int8)
        )
        return ArrangedBlocks(
            outputs,
            inputs,
            self._tensor(*values),
            self._tensor(f"{name}.scales", (count // BLOCK,), np.float16),
            self._optional(f"{name}.bias", padded(outputs)),
            self._tensor(f"{name}.lows", (count // BLOCK,), np.float16) if int4 else None,
        )

    def _optional(self, name: str, size: int) -> Floats | None:
        return self._vector(name, size) if name in self._left else None

    def _vector(self, name: str, size: int) -> Floats:
        return self._tensor(name, (size,), np.float32)

    def _tensor(self, name: str, shape: tuple[int, ...], *dtypes: type[np.generic]) -> Array:
        """Return a copy that begins on a cache line."""
        if name not in self._left:
            raise NotReady("a ready decoder lacks a tensor")
        self._left.discard(name)
        array = self._arrays.read(name, shape, dtypes)
        if array is None:
            raise NotReady(OTHER)
        return array
