"""A decoder of the common form over a device's operators: tokens in, rows of logits out.

Owns: the order of operators in a layer, the weights on the device. Must not know: which device, plans, slots.
Invariant: every number it uses is on the device before the first launch, and nothing is read back, so that a
whole step can be captured.

    x = embedding[ids]
    layer:  norm -> qkv -> rotate and store -> attend -> output -> + x -> norm -> gate, up -> down -> + x
    norm of the wanted tokens -> head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from container.model.device import (
    Activation,
    Angles,
    HeadNorm,
    HeadShape,
    LayerPages,
    Operators,
    StepRows,
    Weight,
)


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """One layer's weights; `qkv` and `gate_up` are their parts' outputs one after another."""

    shape: HeadShape
    attention_norm: Tensor
    qkv: Weight
    output: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    head_norms: HeadNorm | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """A whole decoder; `embedding` is (vocabulary, hidden)."""

    layers: Sequence[DecoderLayer]
    embedding: Tensor
    last_norm: Tensor
    head: Weight
    angles: Angles
    epsilon: float
    activation: Activation

    def tensors(self) -> list[Tensor]:
        """Return every tensor once."""
        found: list[Tensor] = [self.embedding, self.last_norm, self.angles.cosines, self.angles.sines]
        weights = [self.head]
        for layer in self.layers:
            found += [layer.attention_norm, layer.mlp_norm]
            if layer.head_norms is not None:
                found += [layer.head_norms.query, layer.head_norms.key]
            weights += [layer.qkv, layer.output, layer.gate_up, layer.down]
        for weight in weights:
            parts = (getattr(weight, name, None) for name in ("weight", "packed", "scales", "bias"))
            found += [part for part in parts if part is not None]
        return list({id(tensor): tensor for tensor in found}.values())


def forward(
    operators: Operators,
    weights: DecoderWeights,
    pages: Sequence[LayerPages],
    ids: Tensor,
    rows: StepRows,
    wanted: Tensor,
) -> Tensor:
    """Return the logits (wanted, vocabulary) float32 of the tokens numbered `wanted`.

    `ids` (tokens,) and `wanted` are int32 on the device. Writes the tokens' keys and values to their places.
    """
    residual = weights.embedding[ids]
    change: Tensor | None = None
    for layer, own in zip(weights.layers, pages, strict=True):
        hidden = _normed(operators, layer.attention_norm, weights.epsilon, residual, change)
        query = operators.rotate_and_store(
            operators.linear(hidden, layer.qkv),
            layer.shape,
            weights.angles,
            layer.head_norms,
            weights.epsilon,
            rows,
            own,
        )
        attended = operators.attend(query, layer.shape, rows, own)
        change = operators.linear(attended, layer.output)
        hidden = _normed(operators, layer.mlp_norm, weights.epsilon, residual, change)
        gated = operators.gated(operators.linear(hidden, layer.gate_up), weights.activation)
        change = operators.linear(gated, layer.down)
    assert change is not None, "a decoder has a layer"
    last = residual[wanted] + change[wanted]
    return operators.linear(
        operators.rms_norm(last, weights.last_norm, weights.epsilon), weights.head
    ).float()


def _normed(
    operators: Operators, weight: Tensor, epsilon: float, residual: Tensor, change: Tensor | None
) -> Tensor:
    if change is None:
        return operators.rms_norm(residual, weight, epsilon)
    return operators.rms_norm(change, weight, epsilon, residual=residual)
