"""Faster forms of a model's own modules, each installed only after it gave what the original gives.

Owns: which parts are replaced, in what order, how a replacement is undone.
Must not know: architectures and class names, attention, KV, quantization, ranks.
Invariant: a module that differs, or cannot be judged, stays as it is and raises nothing; a weight is never
held twice, neither beside its fused form nor after `undo`.

Three parts: query, key and value projections become one matrix product, gate and up projections become
one, and RMS norms become one call. All work on whatever shapes they find, so on a rank's slice as on the
whole. Order: load, slice, fuse, compare with the reference, `commit`, quantize. Fused weights lie in plain
`nn.Linear` modules (`q_proj.qkv`, `gate_up`), which a quantizer replaces like any other.

Negative result: nothing here pays on a CPU in fp32, so `auto` leaves it off there (CPU_PARTS). SmolLM2-135M,
one thread of a busy 2-core AVX2 machine, `python -m tests.model.surgery_speed`, 2026-11-23, median ratios of
CPU time, fused to unfused, for decoding 1, 8 and 32 rows and a prefill of 256 tokens: untouched copies 0.98,
1.02, 0.99, 0.99 (the noise); projections of attention 1.02, 1.04, 1.02, 1.01; gate and up 1.04, 1.02, 1.01,
1.08; norms 1.02 and 1.01 for 1 and 8 rows, not measured beyond (one norm of one row: 49 us against 55 us, a
third of a percent of a step). On a GPU the gain would be fewer kernels; that is not measured yet.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch
from torch import nn

from container.model import surgery_linear, surgery_norm
from container.model.shape import SizingError


class Part(enum.StrEnum):
    """What is replaced. Closed: it is told in the facts about a model."""

    QKV = "qkv"  # parallel projections of attention: one product
    GATE_UP = "gate_up"  # the two projections of a gated MLP: one product
    NORM = "norm"  # root mean square norms: one call


Judgement = TypeVar("Judgement")
SETTINGS: Final = ("auto", "on", "off")
ALL_PARTS: Final = frozenset(Part)
CPU_PARTS: Final[frozenset[Part]] = frozenset()  # none pays: see above


def parts(setting: str, device: str = "cpu") -> frozenset[Part]:
    """Return what `surgery` = `setting` replaces on `device`; raises SizingError for an unknown name."""
    if setting == "off":
        return frozenset()
    if setting == "on":
        return ALL_PARTS
    if setting == "auto":
        return CPU_PARTS if device == "cpu" else ALL_PARTS
    raise SizingError(f"`surgery` is `{setting}`; choose one of {', '.join(SETTINGS)}")


@dataclass(slots=True)
class Fused:
    """What was replaced, and the way back until `commit`."""

    counts: Counter[Part] = field(default_factory=Counter)
    seconds: float = 0.0
    _undo: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)

    def replace(self, parent: nn.Module, name: str, replacement: nn.Module) -> None:
        """Install `replacement` as `parent.name`, noting what stood there."""
        self._undo.append((parent, name, parent.get_submodule(name)))
        setattr(parent, name, replacement)

    def undo(self) -> None:
        """Put the original modules back; their weights are views of the fused ones. Not after `commit`."""
        while self._undo:
            parent, name, original = self._undo.pop()
            setattr(parent, name, original)
        self.counts.clear()

    def commit(self) -> None:
        """Let go of the originals, so that quantizing a fused weight frees it."""
        self._undo.clear()


def guarded(
    module: nn.Module,
    chosen: frozenset[Part],
    trial: Callable[[], object],
    judge: Callable[[], Judgement],
    failure: type[Exception],
) -> tuple[Judgement, dict[str, int]]:
    """Return what `judge` says of the fused `module`, and what was fused; where it fails, without surgery.

    Raises `failure` when `trial` does, or when `judge` does without surgery too.
    """
    fused = fuse(module, chosen, trial)
    try:
        judgement = judge()
    except failure:
        if not fused.counts:
            raise
        fused.undo()
        judgement = judge()
    fused.commit()
    return judgement, {part.value: count for part, count in fused.counts.items()}


@torch.no_grad()
def fuse(
    module: nn.Module,
    chosen: frozenset[Part] = ALL_PARTS,
    trial: Callable[[], object] | None = None,
) -> Fused:
    """Replace the `chosen` parts anywhere inside `module` (a layer or a model), each once it was verified.

    `trial` runs one forward of any tokens; given it, projections are fused only where that forward hands all
    of a group the same tensor. Without it that is found out by the first forward, which then raises
    AssertionError. Raises what `trial` raises, before anything was changed.
    """
    begun = time.monotonic()
    fused = Fused()
    shared = surgery_linear.shared_parameters(module)
    owners = list(module.modules())
    if Part.QKV in chosen:
        groups = surgery_linear.find_groups(owners, shared)
        if trial is not None and groups:
            groups = surgery_linear.same_input(groups, trial)
        for group in groups:
            members = surgery_linear.fuse_group(group)
            if members is not None:
                for name, member in zip(group.names, members, strict=True):
                    fused.replace(group.owner, name, member)
                fused.counts[Part.QKV] += 1
    replacers = {Part.GATE_UP: surgery_linear.fuse_gated, Part.NORM: surgery_norm.fuse_norm}
    for part in (part for part in replacers if part in chosen):
        for owner in owners:
            for name, child in list(owner.named_children()):
                if not shared.isdisjoint(map(id, child.parameters())):
                    continue
                replacement = replacers[part](child)
                if replacement is not None:
                    fused.replace(owner, name, replacement)
                    fused.counts[part] += 1
    fused.seconds = time.monotonic() - begun
    return fused
