"""Parallel linear layers as one: query, key and value; gate and up.

Owns: finding such layers, joining their weights, the modules that stand in their place.
Must not know: architectures, attention; that anything is ever quantized or sliced.
Invariant: after joining, the originals' weights are views of the joined one, whether it is used or not.

Where three layers read the same tensor, the first is replaced by a head, which multiplies once and keeps what
belongs to the others, the others by tails, which hand it out. No forward of the model is rewritten. A tail
insists on the very tensor its head got: an equal one, or an older one, is a mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from container.model.surgery_check import ROWS, agree, output, plain, random_input

# Names by which models call projections of one input, in the order of calling. The other two are those of
# latent attention, with and without a low-rank query.
GROUPS: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
)
MARK: Final = (3.0, 0.5)  # any but 1 and 0: shows a down projection that is left out or applied twice


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers of one owner that may read the same input."""

    owner: nn.Module
    names: tuple[str, ...]
    members: tuple[nn.Linear, ...]


class Head(nn.Module):
    """Stands for the first of a group: one product for all, of which it returns its own columns."""

    def __init__(self, joined: nn.Linear, widths: Sequence[int]) -> None:
        super().__init__()
        self.qkv = joined
        self._widths = list(widths)
        self._input: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    def forward(self, hidden: Tensor) -> Tensor:
        first: Tensor
        first, *others = torch.split(self.qkv(hidden), self._widths, dim=-1)
        self._input = hidden
        self._kept = dict(enumerate(others, 1))
        return first

    def take(self, place: int, hidden: Tensor) -> Tensor:
        """Return the columns of the member at `place`, once; raises AssertionError for another input."""
        if (
            hidden is not self._input or place not in self._kept
        ):  # no `assert`: it must hold under `python -O` too
            raise AssertionError("projections computed as one were given different inputs")
        part = self._kept.pop(place)
        if not self._kept:
            self._input = None  # nothing of a request stays behind
        return part


class Tail(nn.Module):
    """Stands for another of a group: hands out what its head has computed."""

    def __init__(self, head: Head, place: int) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple, or torch would list the head's weights under this module as well
        self._place = place

    def forward(self, hidden: Tensor) -> Tensor:
        return self._head[0].take(self._place, hidden)


class GatedMLP(nn.Module):
    """down(act(gate) * up), with one product for gate and up."""

    def __init__(
        self, joined: nn.Linear, width: int, down: nn.Module, act: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_up = joined
        self.down_proj = down
        self.act_fn = act
        self._width = width

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = torch.split(self.gate_up(hidden), self._width, dim=-1)
        result: Tensor = self.down_proj(self.act_fn(gate) * up)
        return result


def shared_parameters(module: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules use: they cannot be moved."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return {which for which, count in uses.items() if count > 1}


def find_groups(owners: Sequence[nn.Module], shared: set[int]) -> list[Group]:
    """Return the groups among the children of `owners` that can be joined, by name and shape."""
    groups = []
    for owner in owners:
        children = dict(owner.named_children())
        for names in GROUPS:
            members = _joinable([children.get(name) for name in names])
            if members and shared.isdisjoint(id(p) for member in members for p in member.parameters()):
                groups.append(Group(owner, names, members))
                break
    return groups


def same_input(groups: Sequence[Group], trial: Callable[[], object]) -> list[Group]:
    """Return the groups whose members got one tensor, each once, in order, while `trial` ran."""
    seen: list[list[tuple[int, Tensor]]] = [[] for _ in groups]

    def watch(calls: list[tuple[int, Tensor]], place: int) -> Callable[[nn.Module, Any], None]:
        return lambda _, arguments: calls.append((place, arguments[0]))

    handles = [
        member.register_forward_pre_hook(watch(calls, place))
        for group, calls in zip(groups, seen, strict=True)
        for place, member in enumerate(group.members)
    ]
    try:
        trial()
    finally:
        for handle in handles:
            handle.remove()
    return [group for group, calls in zip(groups, seen, strict=True) if _one_tensor(group, calls)]


def fuse_group(group: Group) -> list[nn.Module] | None:
    """Return a head and tails for `group`, or None where they do not give what its members give."""
    widths = [member.weight.shape[0] for member in group.members]
    head = Head(join(group.members), widths)
    stands: list[nn.Module] = [head, *(Tail(head, place) for place in range(1, len(widths)))]
    weight = group.members[0].weight
    hidden = random_input((*ROWS, weight.shape[1]), weight)
    for stand, member in zip(stands, group.members, strict=True):
        if not agree(output(stand, hidden), output(member, hidden)):
            return None
    return stands


def fuse_gated(module: nn.Module) -> nn.Module | None:
    """Return a GatedMLP in place of `module`, or None where it computes anything else.

    The down projection is not run, but stood in for: it may be a slice that is added up over ranks.
    """
    children = dict(module.named_children())
    pair = _joinable([children.get("gate_proj"), children.get("up_proj")])
    down, act = children.get("down_proj"), getattr(module, "act_fn", None)
    if not pair or down is None or not callable(act) or not plain(module):
        return None
    width = pair[0].weight.shape[0]
    if width != pair[1].weight.shape[0]:
        return None
    hidden = random_input((*ROWS, pair[0].weight.shape[1]), pair[0].weight)
    module.down_proj = _Mark()
    try:
        expected = output(module, hidden)
    finally:
        module.down_proj = down
    if expected is None:
        return None
    joined = join(pair)
    if not agree(output(GatedMLP(joined, width, _Mark(), act), hidden), expected):
        return None
    return GatedMLP(joined, width, down, act)


def join(members: Sequence[nn.Linear]) -> nn.Linear:
    """Return one layer with all rows of `members`, whose own weights become views of it.

    Each member's old storage is free before the next is copied, so no more is held twice than one group.
    """
    first = members[0].weight
    heights = [member.weight.shape[0] for member in members]
    joined = nn.Linear(first.shape[1], sum(heights), bias=False, device="meta")
    weight = torch.empty(sum(heights), first.shape[1], dtype=first.dtype, device=first.device)
    for member, rows in zip(members, torch.split(weight, heights), strict=True):
        rows.copy_(member.weight)
        member.weight = nn.Parameter(rows, requires_grad=False)
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if any(member.bias is not None for member in members):
        bias = torch.zeros(sum(heights), dtype=first.dtype, device=first.device)
        for member, part in zip(members, torch.split(bias, heights), strict=True):
            if member.bias is not None:
                part.copy_(member.bias)
                member.bias = nn.Parameter(part, requires_grad=False)
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined.eval()


class _Mark(nn.Module):
    """An elementwise map in place of a down projection, whatever its width."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * MARK[0] + MARK[1]


def _joinable(members: Sequence[nn.Module | None]) -> tuple[nn.Linear, ...]:
    """Return `members` when all are plain linear layers with as many inputs, of one dtype; else nothing."""
    found: list[nn.Linear] = []
    for member in members:
        if not isinstance(member, nn.Linear) or type(member) is not nn.Linear or not plain(member):
            return ()
        found.append(member)
    kinds = {(m.weight.shape[1], m.weight.dtype, m.weight.device) for m in found}
    kinds |= {(m.weight.shape[1], m.bias.dtype, m.bias.device) for m in found if m.bias is not None}
    if len(kinds) != 1 or found[0].weight.is_meta or not found[0].weight.is_floating_point():
        return ()
    return tuple(found)


def _one_tensor(group: Group, calls: Sequence[tuple[int, Tensor]]) -> bool:
    in_order = [place for place, _ in calls] == list(range(len(group.members)))
    return in_order and all(hidden is calls[0][1] for _, hidden in calls)
