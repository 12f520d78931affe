"""Replaces a model's linear layers and experts by quantized ones, one at a time.

Owns: the walk, what is left alone and why, freeing each full-precision weight, the report.
Must not know: which scheme suits the machine (quantize_choose), how a format computes.
Invariant: at any moment at most one layer is held in both forms, and what a format needs beside them is no
more than TILE_WEIGHTS take; a layer is replaced whole or not at all.

Works on a whole model, on one decoder layer, before or after slicing and fusing: whatever holds a child of
type nn.Linear (a row- or column-parallel wrapper too) gets another child under the same name. On a skeleton
(meta device) nothing is computed: the result waits for `load_packed` of what was saved before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from container.model.quantize_choose import Scheme
from container.model.quantize_format import Format, Obstacle, Plain, format_for
from container.model.quantize_modules import PackedExperts, PackedLinear, PackedWeight

HEAD_NAMES: Final = frozenset({"lm_head", "embed_out", "output_projection"})
# The head too, where it is read at every step and costs little: on the demo model int8 blocks there raise KL
# from 0.0032 to 0.0043; a step then reads 143 MB instead of 226. Never in fewer bits: its errors reach every
# token directly.
HEADS: Final = {Scheme.INT8_BLOCK: Scheme.INT8_BLOCK, Scheme.INT4_BLOCK: Scheme.INT8_BLOCK}
ROUTER_NAMES: Final = frozenset({"gate", "router", "wg", "shared_expert_gate"})
ENTRY_NAMES: Final = ("gate_up_proj", "up_proj")  # the first weight of experts, with a gate and without
DOWN_NAME: Final = "down_proj"
# Weights packed at a time: of 2048 x 8192 at once, bnb-nf4 held 500 MB beside them. Rows are independent.
TILE_WEIGHTS: Final = 2**20
ROWS_MULTIPLE: Final = 16  # of rows in a tile: no format asks for more


class PackedMismatch(Exception):
    """Saved tensors do not fit the model: one is missing, too many, or of another shape or dtype."""


@dataclass(slots=True)
class Report:
    """What was quantized and what was left; counts and bytes, never a name."""

    scheme: Scheme
    linears: int = 0
    expert_weights: int = 0  # stacks of all experts' weights: two per mixture
    misaligned: int = 0  # in other blocks than usual: as shards they may differ from the whole
    bytes_before: int = 0  # of what was replaced
    bytes_after: int = 0
    left: Counter[Obstacle] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        """Count `other`, of another part of the same model, too."""
        assert other.scheme is self.scheme, "one model has one scheme"
        self.linears += other.linears
        self.expert_weights += other.expert_weights
        self.misaligned += other.misaligned
        self.bytes_before += other.bytes_before
        self.bytes_after += other.bytes_after
        self.left.update(other.left)

    @property
    def nothing_done(self) -> bool:
        return not self.linears and not self.expert_weights

    def describe(self) -> str:
        """Return one line for the log."""
        left = ", ".join(f"{count} left ({why.value})" for why, count in sorted(self.left.items()))
        warning = (
            f"; {self.misaligned} in smaller blocks than usual, so that shards may differ from the whole"
            if self.misaligned
            else ""
        )
        done = f"{self.scheme.value}: {self.linears} linear layers, {self.expert_weights} stacks of experts"
        size = f"{self.bytes_before >> 10} KiB to {self.bytes_after >> 10} KiB"
        return f"{done}, {size}{'; ' + left if left else ''}{warning}"


def quantize(module: nn.Module, scheme: Scheme) -> Report:
    """Quantize the linear layers and experts below `module` in place and return what was done.

    Left as they are: the head (but see HEADS), embeddings, norms, routers, and weights whose sizes are
    not multiples of the scheme's block. On meta tensors the packed ones are meta too. `none` does nothing.
    """
    report = Report(scheme)
    if scheme is Scheme.NONE:
        return report
    get_head = getattr(module, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    with torch.no_grad():
        form = format_for(scheme)
        heads = format_for(HEADS[scheme]) if scheme in HEADS else None
        _Walk(form, report, head, heads).below(module, form, False)
    return report


def load_packed(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors`, once the state dict of a quantized module, into a quantized skeleton of the same.

    The tensors themselves become the module's: nothing is copied or quantized. Raises PackedMismatch.
    """
    expected = module.state_dict()
    lacking = sum(name not in tensors for name in expected)
    unknown = sum(name not in expected for name in tensors)
    wrong = sum(
        (tensors[name].shape, tensors[name].dtype) != (tensor.shape, tensor.dtype)
        for name, tensor in expected.items()
        if name in tensors
    )
    if lacking or unknown or wrong:
        raise PackedMismatch(
            f"{lacking} tensors are missing, {unknown} are not known, {wrong} have another shape or dtype"
        )
    module.load_state_dict(dict(tensors), assign=True)


def empty(scheme: Scheme, in_features: int, out_features: int, bias: torch.dtype | None) -> PackedLinear:
    """Return a quantized linear layer on the meta device; `bias` is the dtype of its bias, None for none."""
    form = format_for(scheme)
    assert form.obstacle(out_features, in_features) is None, "these sizes cannot be packed"
    vector = None
    if bias is not None:
        vector = nn.Parameter(torch.empty(out_features, dtype=bias, device="meta"), requires_grad=False)
    sizes = (out_features, in_features)
    return PackedLinear(form, _allocate(form, sizes, (), torch.device("meta")), sizes, vector)


class _Walk:
    """One pass over a tree of modules; remembers what it replaced, for modules that hang in two places."""

    def __init__(self, form: Format, report: Report, head: nn.Module | None, heads: Format | None) -> None:
        self._form = form
        self._heads = heads  # what heads are packed in, None: they stay
        self._report = report
        self._head = head
        self._replaced: dict[int, nn.Module] = {}
        self._kept: list[nn.Module] = []
        self._seen: set[int] = set()

    def below(self, parent: nn.Module, form: Format, routing: bool) -> None:
        """Replace what can be among the children of `parent` and below them, linear layers by `form`."""
        for name in [name for name, _ in parent.named_children()]:
            child = parent.get_submodule(name)
            known = self._replaced.get(id(child))
            if known is not None:
                setattr(parent, name, known)
                continue
            chosen = self._heads if child is self._head or name in HEAD_NAMES else form
            if chosen is None:
                self._leave(Obstacle.OUTPUT)
                continue
            replacement = self._visit(child, chosen, routing or _routes(name, child))
            if replacement is not None:
                setattr(parent, name, replacement)

    def _visit(self, child: nn.Module, form: Format, routing: bool) -> nn.Module | None:
        if id(child) in self._seen:
            return None
        self._seen.add(id(child))
        replacement: nn.Module | None = None
        if type(child) is nn.Linear or type(child) is Conv1D:
            replacement = self._linear(child, form, routing)
        elif any(_is_stack(child, name) for name in (*ENTRY_NAMES, DOWN_NAME)):
            replacement = self._experts(child)
        else:
            self.below(child, form, routing)
        if replacement is not None:
            self._replaced[id(child)] = replacement
            self._kept.append(child)  # alive as long as the memo, or another could get its id; without weight
        return replacement

    def _leave(self, why: Obstacle) -> None:
        self._report.left[why] += 1

    def _linear(self, linear: Any, form: Format, routing: bool) -> PackedLinear | None:
        transposed = type(linear) is Conv1D
        weight = linear.weight.t() if transposed else linear.weight
        out_features, in_features = weight.shape
        why = Obstacle.ROUTER if routing else form.obstacle(out_features, in_features)
        if why is not None:
            self._leave(why)
            return None
        parts = _pack(form, weight)
        packed = PackedLinear(form, parts, (out_features, in_features), linear.bias)
        self._count(weight, packed, form)
        self._report.linears += 1
        linear._parameters["weight"] = None  # freed here, whoever else still holds the layer
        return packed.train(linear.training)

    def _experts(self, experts: Any) -> PackedExperts | None:
        entry = next((name for name in ENTRY_NAMES if _is_stack(experts, name)), None)
        known = entry is not None and _is_stack(experts, DOWN_NAME) and hasattr(experts, "_apply_gate")
        if entry is None or not known or experts.has_gate != (entry == "gate_up_proj"):
            self._leave(Obstacle.LAYOUT)
            return None
        outer, inner = self._stack(experts, entry), self._stack(experts, DOWN_NAME)
        return PackedExperts(experts, (entry, outer), inner).train(experts.training)

    def _stack(self, experts: Any, name: str) -> PackedWeight:
        """Return the packed form of a stack of weights, or the stack itself in the same clothes."""
        stack: Tensor = getattr(experts, name)
        weights = stack.transpose(1, 2) if experts.is_transposed else stack
        count, out_features, in_features = weights.shape
        why = self._form.obstacle(out_features, in_features)
        if why is not None:
            self._leave(why)
            packed = PackedWeight(Plain(), {"weight": weights.detach().contiguous()})
        else:
            parts = _allocate(self._form, (out_features, in_features), (count,), weights.device)
            for index in range(0 if weights.is_meta else count):
                for part_name, part in _pack(self._form, weights[index]).items():
                    parts[part_name][index] = part
            packed = PackedWeight(self._form, parts)
            self._count(weights, packed, self._form)
            self._report.expert_weights += 1
        del experts._parameters[name]
        return packed

    def _count(self, weight: Tensor, packed: PackedWeight, form: Format) -> None:
        self._report.bytes_before += weight.nbytes
        self._report.bytes_after += packed.packed_bytes
        self._report.misaligned += weight.shape[-1] % form.aligned_width != 0


def _routes(name: str, module: nn.Module) -> bool:
    return name in ROUTER_NAMES or "Router" in type(module).__name__


def _is_stack(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.dim() == 3


def _pack(form: Format, weight: Tensor) -> dict[str, Tensor]:
    """Return the parts of `weight`, packed some rows at a time: a format holds copies while it packs."""
    outputs, inputs = weight.shape
    parts = _allocate(form, (outputs, inputs), (), weight.device)
    rows = max(1, TILE_WEIGHTS // inputs) // ROWS_MULTIPLE * ROWS_MULTIPLE or ROWS_MULTIPLE
    for first in range(0, 0 if weight.is_meta else outputs, rows):
        for name, part in form.pack(weight.detach()[first : first + rows]).items():
            parts[name][first : first + rows] = part
    return parts


def _allocate(
    form: Format, sizes: tuple[int, int], stack: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    return {
        name: torch.empty((*stack, *part.shape), dtype=part.dtype, device=device)
        for name, part in form.parts(*sizes).items()
    }
