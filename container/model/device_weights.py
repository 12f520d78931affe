"""A loaded model of the common decoder form as a device's weights: recognised, moved, in one precision.

Owns: which modules make such a decoder, joining their weights. Must not know: devices' libraries, plans.
Invariant: a model of another form is refused, never half taken; what is taken is judged by the probe's replay
before it serves (device_start).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from container.kernels.gpu.int4_format import GROUPS, pack
from container.model.device import Activation, Angles, Dense, Device, Fp8, HeadNorm, HeadShape, Int4, Weight
from container.model.device_decoder import DecoderLayer, DecoderWeights
from container.model.fused import ATTENTION, HEAD_NORMS, LAYER, MLP, NotFused
from container.model.kv_limits import LayerShape

ACTIVATIONS: Final = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
MULTIPLE: Final = 16  # of both widths, by the fp8 product

Pack = Callable[[Tensor, Tensor | None], Weight]


def dense(weight: Tensor, bias: Tensor | None) -> Weight:
    """Return the weight as it is."""
    return Dense(weight, bias)


def fp8(weight: Tensor, bias: Tensor | None) -> Weight:
    """Return the weight in fp8 e4m3, a scale per output; as it is where the product has no such width."""
    if any(width % MULTIPLE for width in weight.shape):
        return Dense(weight, bias)
    from container.model.quantize_fp8 import to_fp8

    numbers, scales = to_fp8(weight)
    return Fp8(numbers, scales, bias)


def int4(weight: Tensor, bias: Tensor | None) -> Weight:
    """Return the weight in 4 bits, in the largest groups; as it is where its inputs are no whole groups."""
    group = max((size for size in GROUPS if weight.shape[1] % size == 0), default=None)
    if group is None:
        return Dense(weight, bias)
    packed = pack(weight, group)
    return Int4(packed.packed, packed.scales, bias)


def take(
    model: Any, text_config: Any, shapes: Sequence[LayerShape], device: Device, pack: Pack, positions: int
) -> DecoderWeights:
    """Return the weights of `model` on `device`, products in the form that `pack` gives them.

    `shapes` are the layers' as the probe measured them; `positions` is how many are served. Raises NotFused
    where the model has another form.
    """
    check(model)
    base = model.model
    epsilons = {_epsilon(norm) for norm in _norms(base)}
    activation = ACTIVATIONS.get(str(getattr(text_config, "hidden_act", None)))
    if len(epsilons) != 1 or activation is None or any(s.key_dim != s.value_dim for s in shapes):
        raise NotFused("norms, activation or heads")

    def moved(tensor: Tensor) -> Tensor:
        to = device.zeros(tensor.shape, tensor.dtype)
        device.upload(tensor.detach(), to).wait()
        return to

    def joined(members: Sequence[nn.Linear]) -> Weight:
        weight = torch.cat([moved(member.weight) for member in members])
        return pack(weight, _bias(members, moved))

    layers = []
    for layer, shape in zip(base.layers, shapes, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        heads = attention.q_proj.out_features // shape.key_dim
        head_norms = None
        if hasattr(attention, "q_norm"):
            head_norms = HeadNorm(moved(attention.q_norm.weight), moved(attention.k_norm.weight))
        layers.append(
            DecoderLayer(
                HeadShape(heads, shape.kv_heads, shape.key_dim, float(attention.scaling), shape.window),
                moved(layer.input_layernorm.weight),
                joined([attention.q_proj, attention.k_proj, attention.v_proj]),
                joined([attention.o_proj]),
                moved(layer.post_attention_layernorm.weight),
                joined([mlp.gate_proj, mlp.up_proj]),
                joined([mlp.down_proj]),
                head_norms,
            )
        )
    head = Dense(moved(model.lm_head.weight), _bias([model.lm_head], moved))
    cosines, sines = _angles(base, positions)
    return DecoderWeights(
        layers,
        moved(base.embed_tokens.weight),
        moved(base.norm.weight),
        head,
        Angles(moved(cosines), moved(sines)),
        epsilons.pop(),
        activation,
    )


def check(model: Any) -> None:
    """Raise NotFused unless the modules of `model` are those of the common form, in plain linear layers."""
    base = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if not layers or not all(hasattr(base, name) for name in ("embed_tokens", "norm", "rotary_emb")):
        raise NotFused("layout")
    for layer in layers:
        if {name for name, _ in layer.named_children()} != LAYER:
            raise NotFused("layers")
        inner = {name for name, _ in layer.self_attn.named_children()}
        feed = {name for name, _ in layer.mlp.named_children()}
        if inner not in (ATTENTION, ATTENTION | HEAD_NORMS) or feed != MLP:
            raise NotFused("attention or feed-forward")
        linears = [getattr(layer.self_attn, name) for name in ATTENTION]
        linears += [getattr(layer.mlp, name) for name in MLP - {"act_fn"}]
        if not all(type(each) is nn.Linear for each in linears):
            raise NotFused("weights")
    if type(getattr(model, "lm_head", None)) is not nn.Linear:
        raise NotFused("head")


def _bias(members: Sequence[nn.Linear], moved: Callable[[Tensor], Tensor]) -> Tensor | None:
    if all(member.bias is None for member in members):
        return None
    return torch.cat(
        [
            moved(member.weight.new_zeros(member.out_features) if member.bias is None else member.bias)
            for member in members
        ]
    )


def _norms(base: Any) -> list[Any]:
    found = [base.norm]
    for layer in base.layers:
        found += [layer.input_layernorm, layer.post_attention_layernorm]
        found += [norm for name in sorted(HEAD_NORMS) if (norm := getattr(layer.self_attn, name, None))]
    return found


def _epsilon(norm: Any) -> float:
    value = getattr(norm, "variance_epsilon", None)
    if value is None or getattr(norm, "bias", None) is not None:
        raise NotFused("norms")
    return float(value)


@torch.inference_mode()
def _angles(base: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (positions, rotated / 2) float32 as the model's own rotation gives them."""
    cosines, sines = base.rotary_emb(torch.zeros(1, 1), torch.arange(positions)[None])
    half = cosines.shape[-1] // 2
    if cosines.dim() != 3 or not torch.equal(cosines[..., :half], cosines[..., half:]):
        raise NotFused("positions")
    first, second = (each[0, :, :half].float().contiguous() for each in (cosines, sines))
    return first, second
