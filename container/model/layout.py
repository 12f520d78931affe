"""From a model's own tensor-parallel plan to what one rank keeps of every parameter.

Owns: reading the plan, telling heads from plain widths, packed parts, the plans transformers lacks.
Must not know: weights' values, files, how ranks talk to each other.
Invariant: a width is cut only where the plan names it and its kind is understood; anything else is refused.

transformers' own styles gather after every packed projection and every norm over all heads, because a slice
by chunk would mix heads. Slices here go by heads and by packed parts, so `colwise_gather_output` and
`rowwise_split_input` are plain column and row parallel layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from container.model.errors import ShardRefused
from container.model.partition import Cut, Heads, Range, even, even_vectors

COLUMN: Final = frozenset({"colwise", "colwise_gather_output", "colwise_rep", "packed_colwise"})
ROW: Final = frozenset({"rowwise", "rowwise_split_input", "packed_rowwise"})
EXPERTS: Final = "moe_tp_experts"
WHOLE: Final = frozenset(
    {
        "replicate",
        "replicated_with_grad_allreduce",
        "embedding_rowwise",  # embeddings are small beside the layers, and a tied head is a view of them
        "embedding_colwise",
        "mla_kv_a_proj",
    }
)
DECODER: Final = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
GATED: Final = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
# Model types without a plan in transformers 5.23, relative to a decoder layer.
OWN_PLANS: Final[dict[str, dict[str, str]]] = {
    "gpt_oss": {
        **DECODER,
        "mlp.experts": EXPERTS,
        "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise",
    },
    "stablelm": {**DECODER, **GATED},
    "opt": {
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.out_proj": "rowwise",
        "fc1": "colwise",
        "fc2": "rowwise",
    },
}
ATTENTION_NAMES: Final = frozenset({"self_attn", "attention", "attn"})
QUERY: Final = frozenset({"q_proj"})
KEY_VALUE: Final = frozenset({"k_proj", "v_proj"})
PACKED_QKV: Final = "qkv_proj"  # all queries, all keys, all values
PER_HEAD_QKV: Final = "query_key_value"  # per head: its query, its key, its value
PACKED_GATE: Final = frozenset({"gate_up_proj"})  # all gates, all ups
NORMS: Final = {"q_norm": True, "k_norm": False, "q_layernorm": True, "k_layernorm": False}  # on queries?
SINKS: Final = "sinks"
# Counts that attention code reads from its module instead of from tensors.
QUERY_COUNTS: Final = ("num_heads", "num_attention_heads", "n_heads")
KEY_VALUE_COUNTS: Final = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True, slots=True)
class SharedNorm:
    """A norm over all heads: its whole width and how many ranks hold the same part."""

    width: int
    copies: int


@dataclass(slots=True)
class Layout:
    """One rank's part of a model; names are those of the model as transformers builds it."""

    rank: int
    size: int
    cuts: dict[str, Cut] = field(default_factory=dict, repr=False)  # by parameter
    rows: list[str] = field(default_factory=list, repr=False)  # linear layers whose result is summed
    experts: list[str] = field(default_factory=list, repr=False)  # expert modules whose result is summed
    first_only: set[str] = field(default_factory=set, repr=False)  # parameters that only rank 0 adds
    norms: dict[str, SharedNorm] = field(default_factory=dict, repr=False)
    attentions: dict[str, Heads] = field(default_factory=dict, repr=False)
    head: str = ""  # the module that makes logits
    vocabulary: int = 0  # its whole width
    columns: Range = (0, 0)  # the rank's part of it
    layers: list[str] = field(default_factory=list, repr=False)  # decoder layers

    @property
    def kv_copies(self) -> int:
        """Return how many ranks hold each key and value head; 1 where attention is not divided."""
        return max((heads.kv_copies for heads in self.attentions.values()), default=1)

    def inputs(self) -> list[int]:
        """Return the distinct widths of this rank's row-parallel inputs, for block-aligned quantization."""
        return sorted({self.cuts[f"{name}.weight"].width for name in self.rows})


def lay_out(model: Any, rank: int, size: int) -> Layout:
    """Return what `rank` of `size` keeps of `model`, which may be on the meta device; raises ShardRefused."""
    layout = Layout(rank, size, layers=decoder_layers(model))
    if size == 1:
        return layout
    _head(model, layout)
    plan = _plan(model, layout.layers)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        style = plan.get(_pattern(name))
        if style is None or style in WHOLE or name == layout.head:
            continue
        if style == EXPERTS:
            _experts(name, module, layout)
        elif style in COLUMN | ROW:
            parent = name.rpartition(".")[0]
            _linear(name, module, modules[parent], style in COLUMN, model.config.get_text_config(), layout)
        else:
            raise ShardRefused(f"the model's plan asks for `{style}`, which is not known here")
    for name in layout.attentions:
        _attention(name, modules[name], layout)
    if not layout.rows and not layout.experts:
        raise ShardRefused("the model's plan divides nothing")
    return layout


def decoder_layers(model: Any) -> list[str]:
    """Return the names of the decoder layers: the longest list of modules of the base model."""
    lists = [
        (len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    ]
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    names = [name for count, name in lists if count == wanted]
    return [f"{names[0]}.{index}" for index in range(wanted or 0)] if names else []


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _plan(model: Any, layers: list[str]) -> dict[str, str]:
    own = OWN_PLANS.get(model.config.get_text_config().model_type)
    if own is not None and layers:
        prefix = _pattern(layers[0])
        return {f"{prefix}.{name}": style for name, style in own.items()}
    plan: dict[str, str] = dict(model.tp_plan or {})
    if not any(style in COLUMN | ROW for name, style in plan.items() if "*" in name):
        raise ShardRefused("the model has no plan for tensor parallelism")
    return plan


def _head(model: Any, layout: Layout) -> None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ShardRefused("the model's output layer is no linear layer")
    layout.head = next(name for name, module in model.named_modules() if module is head)
    layout.vocabulary = head.out_features
    layout.columns = even(head.out_features, layout.rank, layout.size)
    _cut(layout, layout.head, head, 0, (layout.columns,))


def _cut(layout: Layout, name: str, module: nn.Module, dim: int, ranges: tuple[Range, ...]) -> None:
    """Cut a linear layer's outputs (dim 0, with its bias) or inputs (dim 1)."""
    layout.cuts[f"{name}.weight"] = Cut(dim, ranges)
    if dim == 0 and getattr(module, "bias", None) is not None:
        layout.cuts[f"{name}.bias"] = Cut(0, ranges)


def _linear(name: str, module: nn.Module, parent: nn.Module, column: bool, text: Any, layout: Layout) -> None:
    if not isinstance(module, nn.Linear):
        raise ShardRefused(f"the model's plan divides a {type(module).__name__}, which is not known here")
    parent_name, _, leaf = name.rpartition(".")
    in_attention = parent_name.rpartition(".")[2] in ATTENTION_NAMES
    if in_attention:
        heads = layout.attentions.setdefault(parent_name, _heads(parent, text, layout))
        unit = _head_dim(parent, text)
        if column:
            _cut(layout, name, module, 0, _attention_columns(leaf, heads, unit))
            return
        # What a row layer takes per head is the width of a value, which may differ from the query's.
        ranges: tuple[Range, ...] = (heads.query(module.in_features // heads.total),)
    elif leaf in PACKED_GATE and column:
        half = module.out_features // 2
        start, stop = even(half, layout.rank, layout.size)
        ranges = ((start, stop), (half + start, half + stop))
    else:
        width = module.out_features if column else module.in_features
        ranges = (even(width, layout.rank, layout.size),)
    if column:
        _cut(layout, name, module, 0, ranges)
    else:
        layout.rows.append(name)
        _cut(layout, name, module, 1, ranges)


def _head_dim(attention: nn.Module, text: Any) -> int:
    unit = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    return int(unit or text.hidden_size // text.num_attention_heads)


def _heads(attention: nn.Module, text: Any, layout: Layout) -> Heads:
    unit = _head_dim(attention, text)
    total, kv_total = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    query, key = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
    if isinstance(query, nn.Linear):
        total = query.out_features // unit
    if isinstance(key, nn.Linear):
        kv_total = key.out_features // unit
    if hasattr(attention, PER_HEAD_QKV):
        kv_total = total  # every head brings its own key and value
    return Heads(total, kv_total or total, layout.rank, layout.size)


def _attention_columns(leaf: str, heads: Heads, unit: int) -> tuple[Range, ...]:
    if leaf in QUERY:
        return (heads.query(unit),)
    if leaf in KEY_VALUE:
        return (heads.key_value(unit),)
    if leaf == PER_HEAD_QKV:
        return (heads.query(3 * unit),)
    if leaf == PACKED_QKV:
        start, stop = heads.key_value(unit)
        keys = heads.total * unit
        values = keys + heads.kv_total * unit
        return heads.query(unit), (keys + start, keys + stop), (values + start, values + stop)
    raise ShardRefused("the model's plan divides an attention projection that is not known here")


def _attention(name: str, attention: nn.Module, layout: Layout) -> None:
    """Cut what an attention layer holds per head besides its projections."""
    heads = layout.attentions[name]
    for leaf, parameter in attention.named_parameters(recurse=False):
        if leaf != SINKS or parameter.shape != (heads.total,):
            raise ShardRefused("an attention layer holds a parameter that is not known here")
        layout.cuts[f"{name}.{leaf}"] = Cut(0, (heads.query(1),))
    for leaf, of_queries in NORMS.items():
        norm = getattr(attention, leaf, None)
        weight = getattr(norm, "weight", None)
        if norm is None:
            continue
        if not isinstance(weight, nn.Parameter):
            if any(True for _ in norm.parameters()):
                raise ShardRefused("an attention layer's norm is of no known kind")
            continue
        total = heads.total if of_queries else heads.kv_total
        _norm(f"{name}.{leaf}", weight, total, heads, of_queries, layout)


def _norm(
    name: str, weight: nn.Parameter, total: int, heads: Heads, of_queries: bool, layout: Layout
) -> None:
    """Cut a norm of queries or keys: one weight for all heads stays whole, one per head is cut by heads."""
    per_head = weight.dim() == 2 and weight.shape[0] == total
    wide = weight.dim() == 1 and total > 1 and weight.shape[0] == _projected(name, layout, heads, of_queries)
    if not per_head and not wide:
        return
    unit = 1 if per_head else weight.shape[0] // total
    kept = heads.query(unit) if of_queries else heads.key_value(unit)
    layout.cuts[f"{name}.weight"] = Cut(0, (kept,))
    if wide:
        layout.norms[name] = SharedNorm(weight.shape[0], 1 if of_queries else heads.kv_copies)


def _projected(name: str, layout: Layout, heads: Heads, of_queries: bool) -> int:
    """Return the whole width of the projection that the norm follows, 0 when that is not cut."""
    projection = "q_proj" if of_queries else "k_proj"
    cut = layout.cuts.get(f"{name.rpartition('.')[0]}.{projection}.weight")
    if cut is None:
        return 0
    return cut.width * heads.size if of_queries else cut.width // heads.kv_local * heads.kv_total


def _experts(name: str, module: nn.Module, layout: Layout) -> None:
    """Cut every expert's inner width: (experts, 2 inner, hidden), (experts, hidden, inner), or transposed."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter) or up.dim() != 3:
        raise ShardRefused("the experts are not stored as one tensor each for gate, up and down")
    up_dim, down_dim = (2, 1) if getattr(module, "is_transposed", False) else (1, 2)
    inner = down.shape[down_dim]
    if up.shape[up_dim] != 2 * inner:
        raise ShardRefused("the experts' tensors have shapes that are not known here")
    start, stop = even_vectors(inner, layout.rank, layout.size)
    if getattr(module, "is_concatenated", True):
        packed: tuple[Range, ...] = ((start, stop), (inner + start, inner + stop))
    else:
        packed = ((2 * start, 2 * stop),)  # gate and up of one column are neighbours
    layout.cuts[f"{name}.gate_up_proj"] = Cut(up_dim, packed)
    layout.cuts[f"{name}.down_proj"] = Cut(down_dim, ((start, stop),))
    for leaf, _ in module.named_parameters(recurse=False):
        if leaf == "gate_up_proj_bias":
            layout.cuts[f"{name}.{leaf}"] = Cut(1, packed)
        elif leaf == "down_proj_bias":
            layout.first_only.add(f"{name}.{leaf}")
        elif leaf not in ("gate_up_proj", "down_proj"):
            raise ShardRefused("the experts hold a parameter that is not known here")
    layout.experts.append(name)
