"""When two modules count as the same: on random input, in the dtype they work in.

Owns: the random input, the tolerance, which modules may be touched at all.
Must not know: what is being replaced.
Invariant: anything unusual (hooks, several arguments, our own wrappers, NaN, an error) means: not the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

ROWS: Final = (1, 5)  # a batch of one with five tokens
SEED: Final = 17
# Of the largest output and of the element itself. fp32: sums in another order give up to about 1e-6. Half
# precisions: the spacing of neighbouring numbers, since a result may be rounded once less than before.
LIMITS: Final = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def plain(module: nn.Module) -> bool:
    """Return whether `module` may be replaced: it takes one argument and nobody has hooked into it.

    Modules of our own were put there on purpose (slices that add up over ranks, quantized weights); some of
    them talk to other ranks, and none is to be called for a trial.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks) or type(module).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def random_input(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return normal numbers of `shape`, the same each time, in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def output(module: Callable[[Tensor], Any], hidden: Tensor) -> Tensor | None:
    """Return what `module` makes of `hidden`, or None where it raises or gives anything but a tensor."""
    try:
        result = module(hidden)
    except Exception:  # noqa: BLE001 - whatever it raised, it is no module we know how to replace
        return None
    return result if isinstance(result, Tensor) else None


def agree(candidate: Tensor | None, original: Tensor | None) -> bool:
    """Return whether shape, dtype and every element agree within the dtype's limit; NaN never does."""
    if candidate is None or original is None or original.dtype not in LIMITS:
        return False
    if candidate.shape != original.shape or candidate.dtype != original.dtype or not original.numel():
        return False
    limit = LIMITS[original.dtype]
    reference = original.double()
    error = (candidate.double() - reference).abs()
    return bool((error <= limit * (reference.abs() + reference.abs().max())).all())
