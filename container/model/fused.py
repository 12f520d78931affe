"""Models of the common decoder form on the fused native operators: recognised, taken over, compared, run.

Owns: which modules make such a decoder, moving their weights, the packed model that runs on them.
Must not know: plans, sampling, how the operators compute.
Invariant: weights exist once: what was moved is gone from the modules, and comes back when the comparison
fails. Nothing runs fused that did not give the logits of its plain form.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from container.kernels import int8
from container.kernels.attention import AttentionRow, AttentionShape, KVType, PageLayout
from container.kernels.decoder import FusedDecoder, Gate, Layer, Weights
from container.kernels.operators import Native
from container.model import probe
from container.model.kv_cache import KVLimits, LayerShape
from container.model.kv_pages import PagedKV
from container.model.load import LoadedModel
from container.model.packed import PackedRow
from container.model.quantize_modules import PackedLinear, plain_activations
from container.model.quantize_native import NativeInt8

LAYER: Final = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION: Final = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS: Final = {"q_norm", "k_norm"}
MLP: Final = {"gate_proj", "up_proj", "down_proj", "act_fn"}
GATES: Final = {"silu": Gate.SILU, "swish": Gate.SILU, "gelu_pytorch_tanh": Gate.GELU_TANH}
# Of keys and values by setting. Fewer bits are never chosen unasked: bfloat16 moves the demo model's logits
# by 0.7 on a short prompt, enough to turn a near tie.
KV_TYPES: Final = {
    "auto": KVType.FLOAT32,
    "float32": KVType.FLOAT32,
    "bfloat16": KVType.BFLOAT16,
    "int8": KVType.INT8,
}
PROBE_PAGE_TOKENS: Final = 4  # short, so that the probe's sequences cross pages


class NotFused(Exception):
    """The model has another form, or other weights, than the fused operators know; says which part."""


@dataclass(slots=True)
class _Moved:
    """Linear layers whose weights now lie in one, in the order of its groups of outputs."""

    members: list[PackedLinear]
    joined: int8.ArrangedInt8
    interleaved: bool

    def give_back(self) -> None:
        counts = [member.out_features for member in self.members]
        values = int8.split(self.joined.values, counts, interleaved=self.interleaved)
        scales = int8.split(self.joined.scales, counts, interleaved=self.interleaved)
        for member, weight, scale in zip(self.members, values, scales, strict=True):
            member.set_parts(member.form, {"weight": weight, "weight_scale": scale})


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
            embedding=base.embed_tokens.weight.detach().float().contiguous(),
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

    def _take(self, members: list[PackedLinear], *, interleaved: bool = False) -> int8.ArrangedInt8:
        arranged = []
        for member in members:
            assert isinstance(member.form, NativeInt8), "checked before anything is moved"
            bias = member.bias if member.bias is None else int8.padded_bias(member.bias)
            arranged.append(replace(member.form.arranged(member.parts()), bias=bias))
        joined = int8.join(arranged, interleaved=interleaved)
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
    """Raise NotFused unless the modules of `model` are those of the common form, in int8 blocks."""
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
    if any(each.out_features % int8.GROUP for each in linears):  # type: ignore[operator]
        raise NotFused("sizes")


def _check_linears(modules: Sequence[nn.Module]) -> None:
    if not all(isinstance(each, PackedLinear) and isinstance(each.form, NativeInt8) for each in modules):
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


def _vector(norm: Any) -> Tensor:
    vector: Tensor = norm.weight.detach().float().contiguous()
    return vector


def _gate(config: Any) -> Gate:
    name = getattr(config, "hidden_act", None)
    gate = GATES.get(name) if isinstance(name, str) else None
    if gate is None:
        raise NotFused("activation")
    return gate


@torch.inference_mode()
def _rotations(base: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (positions, rotated / 2) as the model's own rotation gives them."""
    cosines, sines = base.rotary_emb(torch.zeros(1, 1), torch.arange(positions)[None])
    half = cosines.shape[-1] // 2
    if cosines.dim() != 3 or half % 8 or not torch.equal(cosines[..., :half], cosines[..., half:]):
        raise NotFused("positions")
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()


class FusedModel:
    """A model on the fused operators, with the pages it fills; stands where PackedModel does."""

    def __init__(self, native: Native, weights: Weights, kv: PagedKV, *, plain: bool = False) -> None:
        self.kv = kv
        self._native = native
        self._weights = weights
        self._decoder = FusedDecoder(native, weights, kv.layout, plain=plain)

    def logits(self, rows: Sequence[PackedRow]) -> Tensor:
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
        weights = self._weights
        held = [weights.embedding, weights.last_norm, weights.cosines, weights.sines]
        matrices = [weights.head]
        for layer in weights.layers:
            held += [layer.attention_norm, layer.mlp_norm]
            held += [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
            matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
        held += [part for each in matrices for part in (each.values, each.scales)]
        held += [each.bias for each in matrices if each.bias is not None]
        return sum(tensor.nbytes for tensor in held)

    def close(self) -> None:
        """Wipe keys, values and scratch, end the threads."""
        self.kv.close()
        self._decoder.wipe()
        self._native.close()


@dataclass(frozen=True, slots=True)
class Fused:
    """A model that was taken over. `finite`: its quantized activations gave finite logits on the probe."""

    native: Native
    weights: Weights
    measured: probe.Measured
    finite: bool

    def model(self, limits: KVLimits, kv_type: KVType) -> FusedModel:
        """Return the model to serve with; called once."""
        return FusedModel(self.native, self.weights, PagedKV(self.measured.layers, kv_type, limits))


def token_bytes(layers: Sequence[LayerShape], kv_type: KVType, block_tokens: int) -> int:
    """Return what a token's keys and values take in pages, all layers together, rounded up."""
    shapes = [(layer.kv_heads, layer.key_dim) for layer in layers]
    return -(-PageLayout.of(shapes, block_tokens, kv_type).page_bytes // block_tokens)


def fuse(loaded: LoadedModel, freeze: Callable[[probe.Measured], int], native: Native) -> Fused | None:
    """Return the model on the fused operators, its weights moved out of `loaded`, or None.

    The weights must have been adopted by `native` (container.model.quantize_native). `freeze` is told the
    model's shapes, freezes its positions and returns how many there are. The fused decoder is compared with
    the modules' plain form on the probe's sequences before it is trusted.
    """
    try:
        check(loaded.model)
    except NotFused:
        return None
    sequences = probe.probe_sequences(loaded.text_config.vocab_size)
    try:
        with plain_activations():
            references = probe.reference_logits(loaded.model, sequences)
            probe.hooked(loaded.use_hook)
            measured = probe.measure(loaded.model, loaded.text_config.num_hidden_layers)
    except probe.ProbeFailed:
        return None
    finally:
        loaded.use_reference()
    positions = max(freeze(measured), *map(len, sequences))
    try:
        takeover = Takeover(loaded, measured.layers, positions)
    except NotFused:
        return None
    results = _replay(native, takeover.weights, measured, sequences, plain=True)
    pairs = zip(results, references, strict=True)
    if not all(probe.agree(logits, reference, torch.float32) for logits, reference in pairs):
        takeover.undo()
        return None
    quantized = _replay(native, takeover.weights, measured, sequences, plain=False)
    finite = all(bool(logits.isfinite().all()) for logits in quantized)
    return Fused(native, takeover.weights, measured, finite)


def _replay(
    native: Native,
    weights: Weights,
    measured: probe.Measured,
    sequences: Sequence[Sequence[int]],
    *,
    plain: bool,
) -> list[Tensor]:
    """Return the logits of all tokens of each of `sequences`."""
    limits = KVLimits(len(sequences), max(map(len, sequences)), PROBE_PAGE_TOKENS, 1)
    kv = PagedKV(measured.layers, KVType.FLOAT32, limits)
    results = probe.replay(FusedModel(native, weights, kv, plain=plain).logits, sequences)
    kv.close()
    return [torch.cat(parts) for parts in results]
