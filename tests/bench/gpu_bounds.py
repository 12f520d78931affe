"""What the parts of `scripts/bench gpu` measure with: scale, time on a device, and the bounds beside figures.

Owns: timing, copy and product speeds, rooflines. Must not know: which part asks.
Invariant: a bound is made of what this device was measured to do in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from container.model.device_decoder import DecoderWeights
    from tests.bench.gpu_shapes import Shape


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    tiny: bool
    budget_s: float
    begun_s: float

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.begun_s)

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


def wait_all(scale: Scale) -> None:
    """Return when the device has done everything."""
    if scale.device == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(scale: Scale, work: Callable[[], object], repeats: int) -> float:
    """Return the seconds that one of `repeats` calls takes on the device, after one that is not timed."""
    work()
    wait_all(scale)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    wait_all(scale)
    return (time.perf_counter() - begun) / repeats


def copy_gb_s(scale: Scale) -> float:
    """Return what a copy on the device moves, read and write together."""
    import torch

    source = torch.zeros(scale.pick(2 << 30, 1 << 20), dtype=torch.uint8, device=scale.device)
    to = torch.empty_like(source)
    seconds = timed(scale, lambda: to.copy_(source), scale.pick(20, 2))
    return 2 * source.nbytes / seconds / 1e9


def step_bytes(held: DecoderWeights) -> int:
    """Return the bytes of weights that a step reads: all but the embedding, of which it takes single rows."""
    return sum(tensor.nbytes for tensor in held.tensors() if tensor is not held.embedding)


def gemm_flop_s(scale: Scale) -> float:
    """Return what a large square product in the model's dtype computes per second."""
    import torch

    width = scale.pick(8192, 64)
    dtype = scale.pick(torch.bfloat16, torch.float32)
    factor = torch.randn((width, width), device=scale.device, dtype=dtype)
    return 2 * width**3 / timed(scale, lambda: factor @ factor, scale.pick(20, 2))


def load_bound_s(
    scale: Scale, held: DecoderWeights, shape: Shape, lengths: Sequence[tuple[int, int]], steps: int
) -> float:
    """Return the least seconds a load takes in `steps`: its bytes at copy speed, or its longer products."""
    weight = step_bytes(held)
    seen = sum(prompt * output + output * output / 2 for prompt, output in lengths)
    moved = (steps * weight + seen * shape.kv_bytes) / copy_gb_s(scale) / 1e9
    layers = weight - held.head.weight.nbytes  # type: ignore[union-attr]
    products = 2 * layers / held.embedding.itemsize * sum(map(sum, lengths))
    return max(moved, products / gemm_flop_s(scale))
