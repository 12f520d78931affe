"""A model on the fused native operators, with the pages it fills.

Owns: one step of it, replaying the probe on it. Must not know: where its weights came from, transformers.
Invariant: it stands where PackedModel does: the same rows in, the same logits out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from container.kernels.attention import AttentionRow, KVType, PageLayout
from container.kernels.decoder import FusedDecoder, Weights
from container.kernels.memory import Floats
from container.kernels.operators import Native
from container.model.kv_limits import KVLimits, LayerShape
from container.model.kv_pages import PagedKV
from container.model.replay import Measured, agree, replay
from container.model.rows import PackedRow

# Of keys and values by setting. Fewer bits are never chosen unasked, though bfloat16 halves what attention
# takes where the machine multiplies it: on 4,096 positions of prose it moves the demo model's predictions by
# a KL of 6e-5, but on a short chat it moved logits by 0.7 and made a wrong answer of a right one.
KV_TYPES: Final = {
    "auto": KVType.FLOAT32,
    "float32": KVType.FLOAT32,
    "bfloat16": KVType.BFLOAT16,
    "int8": KVType.INT8,
}
PROBE_PAGE_TOKENS: Final = 4  # short, so that the probe's sequences cross pages


class FusedModel:
    """A model on the fused operators, with the pages it fills; stands where PackedModel does."""

    def __init__(self, native: Native, weights: Weights, kv: PagedKV, *, plain: bool = False) -> None:
        self.kv = kv
        self._native = native
        self._weights = weights
        self._decoder = FusedDecoder(native, weights, kv.layout, plain=plain)

    def logits(self, rows: Sequence[PackedRow]) -> Floats:
        """Run one step; return (sum of wanted, vocabulary) float32, row after row as given.

        Raises KVBudgetExceeded.
        """
        tokens: array[int] = array("i")
        positions: list[int] = []
        wanted: list[int] = []
        packed = []
        for row in rows:
            assert row.start == self.kv.written(row.slot), "a row does not go on where its slot ended"
            first, count = len(tokens), len(row.tokens)
            tokens.extend(row.tokens)
            positions.extend(range(row.start, row.start + count))
            wanted.extend(first + offset for offset in row.wanted)
            packed.append(AttentionRow(first, count, row.start, self.kv.place(row.slot, row.start + count)))
        return self._decoder.forward(tokens, positions, packed, wanted)

    @property
    def weights(self) -> Weights:
        """What it computes with."""
        return self._weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(size for _, size in self.weight_blocks())

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that every step reads whole: all but the tables it takes rows from."""
        return sum(each.nbytes for each in self._streamed())

    def weight_blocks(self) -> list[tuple[int, int]]:
        """Return address and bytes of each weight."""
        weights = self._weights
        held = [*self._streamed(), weights.embedding, weights.cosines, weights.sines]
        return [(each.ctypes.data, each.nbytes) for each in held]

    def _streamed(self) -> Iterator[npt.NDArray[Any]]:
        weights = self._weights
        yield weights.last_norm
        matrices = [weights.head]
        for layer in weights.layers:
            norms = (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
            yield from (norm for norm in norms if norm is not None)
            matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
        for each in matrices:
            yield from each.arrays()

    def mode(self) -> AbstractContextManager[object]:
        """Return what steps run in: nothing."""
        return nullcontext()

    def close(self) -> None:
        """Wipe keys, values and scratch, end the threads."""
        self.kv.close()
        self._decoder.wipe()
        self._native.close()


@dataclass(frozen=True, slots=True)
class Fused:
    """A decoder that gave its reference's logits on the probe.

    `finite`: with quantized activations they are finite. `references`: (tokens, vocabulary) of each sequence,
    as the plain form of its modules computes them.
    """

    native: Native
    weights: Weights
    measured: Measured
    references: Sequence[Floats]
    finite: bool

    def model(self, limits: KVLimits, kv_type: KVType) -> FusedModel:
        """Return the model to serve with; called once."""
        return FusedModel(self.native, self.weights, PagedKV(self.measured.layers, kv_type, limits))


def page_token_bytes(layers: Sequence[LayerShape], kv_type: KVType, block_tokens: int) -> int:
    """Return what a token's keys and values take in pages, all layers together, rounded up."""
    shapes = [(layer.kv_heads, layer.key_dim) for layer in layers]
    return -(-PageLayout.of(shapes, block_tokens, kv_type).page_bytes // block_tokens)


def replay_fused(
    native: Native,
    weights: Weights,
    measured: Measured,
    sequences: Sequence[Sequence[int]],
    *,
    plain: bool,
) -> list[Floats]:
    """Return the logits of all tokens of each of `sequences`."""
    limits = KVLimits(len(sequences), max(map(len, sequences)), PROBE_PAGE_TOKENS, 1)
    kv = PagedKV(measured.layers, KVType.FLOAT32, limits)
    results = replay(FusedModel(native, weights, kv, plain=plain).logits, sequences)
    kv.close()
    return results


def verify(
    native: Native,
    weights: Weights,
    measured: Measured,
    sequences: Sequence[Sequence[int]],
    references: Sequence[Floats],
) -> Fused | None:
    """Return the decoder over `weights`, None where it does not give `references` on `sequences`."""
    results = replay_fused(native, weights, measured, sequences, plain=True)
    pairs = zip(results, references, strict=True)
    if not all(agree(logits, reference) for logits, reference in pairs):
        return None
    quantized = replay_fused(native, weights, measured, sequences, plain=False)
    finite = all(bool(np.isfinite(logits).all()) for logits in quantized)
    return Fused(native, weights, measured, references, finite)
