"""The form of a model's products on a device, and the same form on the host to judge it by.

Owns: which schemes a device serves, the choice by its memory and arithmetic, the reference in that form.
Must not know: how a device computes, the order of a start.
Invariant: what is compared has the same rounded weights on both sides, so that whatever differs beyond a
dtype's rounding is a fault.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from container.model.device import Device
from container.model.device_cpu import PlainOperators
from container.model.device_weights import Pack, dense, fp8, int4
from container.model.quantize_choose import AUTO, Choice, Facts, Scheme, choose

# `int4-block` asks for weights of 4 bits; on a device their groups are larger and their products others.
PACKS: Final[dict[Scheme, Pack]] = {Scheme.NONE: dense, Scheme.FP8: fp8, Scheme.INT4_BLOCK: int4}


def chosen(device: Device, setting: str, facts: Facts) -> Choice | None:
    """Return what `setting` means on `device`, None where it is served without; raises QuantizeRefused.

    `facts` are those of the model; the rest is asked of the device.
    """
    if device.capability is None:
        as_it_is = setting in (AUTO, Scheme.NONE.value)
        return Choice(Scheme.NONE, "as it is on this device") if as_it_is else None
    asked = replace(
        facts,
        device="cuda",
        capability=device.capability,
        memory_bytes=device.free_bytes(),
        block_kernel=True,
    )
    choice = choose(setting, asked)
    return choice if choice.scheme in PACKS else None


class Formed(nn.Module):
    """A linear layer in a device's form, multiplied by plain operators on the host."""

    def __init__(self, linear: nn.Linear, pack: Pack) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self._weight = pack(linear.weight.detach(), bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., outputs)."""
        flat = PlainOperators().linear(hidden.reshape(-1, hidden.shape[-1]), self._weight)
        return flat.view(*hidden.shape[:-1], -1)


@torch.inference_mode()
def form(model: Any, pack: Pack) -> int:
    """Put every linear layer of the decoder layers of `model` into the form of `pack`; return how many."""
    formed = 0
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Formed(child, pack))
                    formed += 1
    return formed
