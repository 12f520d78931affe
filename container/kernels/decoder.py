"""The fused decoder as Python calls it: its weights, its scratch, one call per step.

Owns: the structures handed to the library, the memory they point to, every check the native code omits.
Must not know: where the weights came from, slots, pages' lifetimes.
Invariant: whatever an address in a structure points to is held by this object, or by the caller for the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from container.kernels import operators
from container.kernels.attention import SCRATCH_FLOATS, AttentionRow, AttentionShape, PageLayout, packed_rows
from container.kernels.block_weight import ArrangedBlocks
from container.kernels.memory import Floats, empty, readable
from container.kernels.operators import Native

LANES: Final = 8


class Gate(IntEnum):
    """What is applied to a gate before it is multiplied with its up projection."""

    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norms are float32 (hidden,), or (dim,) for those of heads.

    `qkv` has all query heads' outputs, then all key heads', then all value heads'; `gate_up` 8 gates and
    their 8 ups in turn (see `blocks.join`).
    """

    attention: AttentionShape
    attention_norm: Floats
    mlp_norm: Floats
    query_norm: Floats | None
    key_norm: Floats | None
    qkv: ArrangedBlocks
    output: ArrangedBlocks
    gate_up: ArrangedBlocks
    down: ArrangedBlocks


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole decoder. `embedding` (vocabulary, hidden), `cosines` and `sines` (positions, rotated / 2)."""

    layers: Sequence[Layer]
    embedding: Floats
    last_norm: Floats
    head: ArrangedBlocks
    cosines: Floats
    sines: Floats
    epsilon: float
    gate: Gate


class FusedDecoder:
    """Runs steps over `weights`. `plain` leaves activations unquantized, to be compared with plain torch."""

    def __init__(self, native: Native, weights: Weights, layout: PageLayout, *, plain: bool = False) -> None:
        self._native = native
        self._weights = weights
        self._layout = layout
        self._hidden = weights.embedding.shape[1]
        first = weights.layers[0]
        self._intermediate = first.down.inputs
        self._vocabulary = weights.embedding.shape[0]
        self._positions = weights.cosines.shape[0]
        self._check()
        layers = [self._layer(number, layer) for number, layer in enumerate(weights.layers)]
        self._layers = (operators.DecoderLayer * len(layers))(*layers)
        self._decoder = operators.Decoder(
            self._hidden,
            self._intermediate,
            len(layers),
            self._vocabulary,
            2 * weights.cosines.shape[1],
            int(weights.gate),
            weights.epsilon,
            int(plain),
            ctypes.addressof(self._layers),
            weights.last_norm.ctypes.data,
            weights.embedding.ctypes.data,
            weights.cosines.ctypes.data,
            weights.sines.ctypes.data,
            weights.head.structure,
            layout.native(),
        )
        self._attention = empty((SCRATCH_FLOATS,))
        self._room = 0
        self._scratch = operators.Scratch()
        self._held: list[npt.NDArray[Any]] = []

    def _check(self) -> None:
        weights = self._weights
        for layer in weights.layers:
            shape = layer.attention
            width = (shape.heads + 2 * shape.kv_heads) * shape.dim
            assert (layer.qkv.outputs, layer.qkv.inputs) == (width, self._hidden), "q k v do not fit"
            inner = shape.heads * shape.dim
            assert (layer.output.outputs, layer.output.inputs) == (self._hidden, inner), "output does not fit"
            both = (2 * self._intermediate, self._hidden)
            assert (layer.gate_up.outputs, layer.gate_up.inputs) == both, "gate and up do not fit"
            down = (self._hidden, self._intermediate)
            assert (layer.down.outputs, layer.down.inputs) == down, "down does not fit"
            for norm, size in (
                (layer.attention_norm, self._hidden),
                (layer.mlp_norm, self._hidden),
                (layer.query_norm, shape.dim),
                (layer.key_norm, shape.dim),
            ):
                assert norm is None or readable(norm, (size,)), "a norm does not fit"
            assert 2 * weights.cosines.shape[1] <= shape.dim, "more is rotated than a head has"
        assert self._hidden % LANES == 0 and weights.cosines.shape[1] % LANES == 0, "whole vectors"
        assert readable(weights.embedding, (self._vocabulary, self._hidden)), "the embedding"
        assert readable(weights.last_norm, (self._hidden,)), "the last norm"
        table = weights.cosines.shape
        assert readable(weights.cosines, table) and readable(weights.sines, table), "the rotations"
        assert weights.head.inputs == self._hidden, "the head does not fit"

    def _layer(self, number: int, layer: Layer) -> operators.DecoderLayer:
        return operators.DecoderLayer(
            self._layout.native_layer(number, layer.attention),
            layer.attention_norm.ctypes.data,
            layer.mlp_norm.ctypes.data,
            None if layer.query_norm is None else layer.query_norm.ctypes.data,
            None if layer.key_norm is None else layer.key_norm.ctypes.data,
            layer.qkv.structure,
            layer.output.structure,
            layer.gate_up.structure,
            layer.down.structure,
        )

    def _make_room(self, tokens: int) -> None:
        if tokens <= self._room:
            return
        layers = self._weights.layers  # heads may differ from layer to layer
        inner = max(layer.attention.heads * layer.attention.dim for layer in layers)
        wide = max(self._intermediate, *(layer.qkv.padded_outputs for layer in layers))
        widest = max(self._hidden, inner, self._intermediate)
        widest = -(-widest // 32) * 32
        threads = self._native.threads
        own, own_values = empty((threads, widest)), empty((threads, widest), np.int16)
        own_scales, own_sums = (empty((threads, widest // 32)) for _ in range(2))
        x, spread = empty((tokens, self._hidden)), empty((tokens, wide))
        narrow = empty((tokens, max(self._hidden, inner)))
        values = empty((tokens, widest), np.int16)
        scales, sums = (empty((tokens, widest // 32)) for _ in range(2))
        self._held = [x, spread, narrow, values, scales, sums, own, own_values, own_scales, own_sums]
        self._scratch = operators.Scratch(
            x.ctypes.data,
            spread.ctypes.data,
            narrow.ctypes.data,
            operators.Activations(values.ctypes.data, scales.ctypes.data, sums.ctypes.data),
            widest,
            own.ctypes.data,
            operators.Activations(own_values.ctypes.data, own_scales.ctypes.data, own_sums.ctypes.data),
            self._attention.ctypes.data,
            self._attention.size,
        )
        self._room = tokens

    def forward(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[AttentionRow],
        wanted: Sequence[int],
    ) -> Floats:
        """Return logits (len(wanted), vocabulary) float32 of the tokens numbered `wanted`.

        `rows` cover all tokens; a page they name must stay where it is until this returns.
        """
        tokens = len(token_ids)
        ids = np.array(token_ids, np.int32)
        places = np.array(positions, np.int32)
        chosen = np.array(wanted, np.int32)
        assert tokens and len(places) == tokens and sum(row.count for row in rows) == tokens, "rows cover all"
        assert ids.min() >= 0 and ids.max() < self._vocabulary, "a token id is outside the vocabulary"
        assert places.min() >= 0 and places.max() < self._positions, "a position was not frozen"
        assert not len(chosen) or (chosen.min() >= 0 and chosen.max() < tokens), "what is wanted is not there"
        packed = packed_rows(rows, tokens, self._layout.page_tokens)
        self._make_room(tokens)
        logits: Floats = empty((len(chosen), self._weights.head.padded_outputs))
        step = operators.DecoderStep(
            tokens,
            len(packed),
            len(chosen),
            ids.ctypes.data,
            places.ctypes.data,
            packed.ctypes.data,
            chosen.ctypes.data,
            logits.ctypes.data,
        )
        self._native.call(
            "strongroom_forward",
            ctypes.byref(self._decoder),
            ctypes.byref(step),
            ctypes.byref(self._scratch),
        )
        return logits[:, : self._weights.head.outputs]

    def wipe(self) -> None:
        """Zero what the last step left in scratch memory."""
        for held in (*self._held, self._attention):
            held.fill(0)
