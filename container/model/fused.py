"""Models of the common decoder form on the fused native operators: recognised, taken over, compared, run.

Owns: which modules make such a decoder, moving their weights, the packed model that runs on them.
Must not know: plans, sampling, how the operators compute.
Invariant: weights exist once: what was moved is gone from the modules, and comes back when the comparison
fails. Nothing runs fused that did not give the logits of its plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from container.kernels import blocks
from container.kernels.attention import AttentionShape
from container.kernels.block_weight import GROUP, ArrangedBlocks
from container.kernels.decoder import Gate, Layer, Weights
from container.kernels.memory import Floats
from container.kernels.operators import Native
from container.model import probe
from container.model.fused_model import Fused, verify
from container.model.kv_limits import LayerShape
from container.model.load import LoadedModel
from container.model.quantize_modules import PackedLinear, plain_activations
from container.model.quantize_native import NativeBlocks, parts_of
from container.model.replay import Measured, ProbeFailed, probe_sequences

LAYER: Final = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION: Final = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS: Final = {"q_norm", "k_norm"}
MLP: Final = {"gate_proj", "up_proj", "down_proj", "act_fn"}
GATES: Final = {"silu": Gate.SILU, "swish": Gate.SILU, "gelu_pytorch_tanh": Gate.GELU_TANH}


class NotFused(Exception):
    """The model has another form, or other weights, than the fused operators know; says which part."""


@dataclass(slots=True)
class _Moved:
    """Linear layers whose weights now lie in one, in the order of its groups of outputs."""

    members: list[PackedLinear]
    joined: ArrangedBlocks
    interleaved: bool

    def give_back(self) -> None:
        counts = [member.out_features for member in self.members]
        weights = blocks.split(self.joined, counts, interleaved=self.interleaved)
        for member, weight in zip(self.members, weights, strict=True):
            member.set_parts(member.form, parts_of(weight))


class Takeover:
    """A model's weights in the operators' layout. `undo` puts them back where they were."""

    def __init__(self, loaded: LoadedModel, shapes: Sequence[LayerShape], positions: int) -> None:
        """Move the weights; raises NotFused, with nothing moved."""
        model: Any = loaded.model
        base = model.model
        attentions = _attentions(base, shapes)
        self._moved: list[_Moved] = []
        epsilons = {_epsilon(norm) for norm in _norms(base)}
        gate = _gate(loaded.text_config)
        if len(epsilons) != 1:
            raise NotFused("norms")
        cosines, sines = _rotations(base, positions)
        self.weights = Weights(
            layers=[self._layer(*each) for each in zip(base.layers, attentions, strict=True)],
            embedding=base.embed_tokens.weight.detach().float().contiguous().numpy(),
            last_norm=_vector(base.norm),
            head=self._take([model.lm_head]),
            cosines=cosines,
            sines=sines,
            epsilon=epsilons.pop(),
            gate=gate,
        )

    def _layer(self, layer: Any, shape: AttentionShape) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            attention=shape,
            attention_norm=_vector(layer.input_layernorm),
            mlp_norm=_vector(layer.post_attention_layernorm),
            query_norm=_vector(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_vector(attention.k_norm) if hasattr(attention, "k_norm") else None,
            qkv=self._take([attention.q_proj, attention.k_proj, attention.v_proj]),
            output=self._take([attention.o_proj]),
            gate_up=self._take([mlp.gate_proj, mlp.up_proj], interleaved=True),
            down=self._take([mlp.down_proj]),
        )

    def _take(self, members: list[PackedLinear], *, interleaved: bool = False) -> ArrangedBlocks:
        arranged = []
        for member in members:
            assert isinstance(member.form, NativeBlocks), "checked before anything is moved"
            bias = member.bias if member.bias is None else blocks.padded_bias(member.bias)
            arranged.append(replace(member.form.arranged(member.parts()), bias=bias))
        joined = blocks.join(arranged, interleaved=interleaved)
        for member in members:  # the joined copy stands for them from here on
            nothing = {name: part.new_empty(0) for name, part in member.parts().items()}
            member.set_parts(member.form, nothing)
        self._moved.append(_Moved(members, joined, interleaved))
        return joined

    def undo(self) -> None:
        """Give every weight back to its module."""
        for moved in self._moved:
            moved.give_back()
        self._moved.clear()


def _attentions(base: Any, shapes: Sequence[LayerShape]) -> list[AttentionShape]:
    found = []
    for layer, shape in zip(base.layers, shapes, strict=True):
        attention = layer.self_attn
        heads = attention.q_proj.out_features // shape.key_dim
        try:
            if shape.key_dim != shape.value_dim:
                raise ValueError("keys and values differ in width")
            scale = float(attention.scaling)
            found.append(AttentionShape(heads, shape.kv_heads, shape.key_dim, scale, shape.window))
        except ValueError:
            raise NotFused("heads") from None
    return found


def check(model: Any) -> None:
    """Raise NotFused unless the modules of `model` are those of the common form, in blocks of integers."""
    base = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if not layers or not all(hasattr(base, name) for name in ("embed_tokens", "norm", "rotary_emb")):
        raise NotFused("layout")
    for layer in layers:
        _check_layer(layer)
    _check_linears([getattr(model, "lm_head", nn.Identity())])


def _check_layer(layer: nn.Module) -> None:
    if {name for name, _ in layer.named_children()} != LAYER:
        raise NotFused("layers")
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    inner = {name for name, _ in attention.named_children()}
    if inner not in (ATTENTION, ATTENTION | HEAD_NORMS) or {name for name, _ in mlp.named_children()} != MLP:
        raise NotFused("attention or feed-forward")
    linears = [attention.get_submodule(name) for name in sorted(ATTENTION)]
    linears += [mlp.get_submodule(name) for name in sorted(MLP - {"act_fn"})]
    _check_linears(linears)
    if any(each.out_features % GROUP for each in linears):  # type: ignore[operator]
        raise NotFused("sizes")


def _check_linears(modules: Sequence[nn.Module]) -> None:
    if not all(isinstance(each, PackedLinear) and isinstance(each.form, NativeBlocks) for each in modules):
        raise NotFused("weights")


def _norms(base: Any) -> Iterator[Any]:
    yield base.norm
    for layer in base.layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        yield from (norm for name in HEAD_NORMS if (norm := getattr(layer.self_attn, name, None)) is not None)


def _epsilon(norm: Any) -> float:
    value = getattr(norm, "variance_epsilon", None)
    if value is None or getattr(norm, "bias", None) is not None:
        raise NotFused("norms")
    return float(value)


def _vector(norm: Any) -> Floats:
    vector: Floats = norm.weight.detach().float().contiguous().numpy()
    return vector


def _gate(config: Any) -> Gate:
    name = getattr(config, "hidden_act", None)
    gate = GATES.get(name) if isinstance(name, str) else None
    if gate is None:
        raise NotFused("activation")
    return gate


@torch.inference_mode()
def _rotations(base: Any, positions: int) -> tuple[Floats, Floats]:
    """Return cosines and sines (positions, rotated / 2) as the model's own rotation gives them."""
    cosines, sines = base.rotary_emb(torch.zeros(1, 1), torch.arange(positions)[None])
    half = cosines.shape[-1] // 2
    if cosines.dim() != 3 or half % 8 or not torch.equal(cosines[..., :half], cosines[..., half:]):
        raise NotFused("positions")
    first, second = (each[0, :, :half].float().contiguous() for each in (cosines, sines))
    return first.numpy(), second.numpy()


def fuse(loaded: LoadedModel, freeze: Callable[[Measured], int], native: Native) -> Fused | None:
    """Return the model on the fused operators, its weights moved out of `loaded`, or None.

    The weights must have been adopted by `native` (container.model.quantize_native). `freeze` is told the
    model's shapes, freezes its positions and returns how many there are. The fused decoder is compared with
    the modules' plain form on the probe's sequences before it is trusted.
    """
    try:
        check(loaded.model)
    except NotFused:
        return None
    sequences = probe_sequences(loaded.text_config.vocab_size)
    try:
        with plain_activations():
            references = probe.reference_logits(loaded.model, sequences)
            probe.hooked(loaded.use_hook)
            measured = probe.measure(loaded.model, loaded.text_config.num_hidden_layers)
    except ProbeFailed:
        return None
    finally:
        loaded.use_reference()
    positions = max(freeze(measured), *map(len, sequences))
    try:
        takeover = Takeover(loaded, measured.layers, positions)
    except NotFused:
        return None
    expected = [logits.numpy(force=True) for logits in references]
    taken = verify(native, takeover.weights, measured, sequences, expected)
    if taken is None:
        takeover.undo()
    return taken
