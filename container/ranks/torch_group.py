"""The same sums and gathers through torch.distributed: NCCL between GPUs, gloo where memory cannot be shared.

Owns: TorchGroup and how its ranks find each other.
Must not know: plans, models, who starts whom.
Invariant: no port is opened to find each other and no file has a name: the store is a FileStore in anonymous
memory that the ranks inherit. The libraries themselves connect over loopback: gloo and NCCL's bootstrap dial
between the ranks while connecting, and gloo sends its data that way; after `connect` nothing new is opened.

Sums are made in float32. gloo's are gathered and added in rank order, as SharedMemoryGroup's; NCCL adds in
the order of its ring or tree, the same on every rank, so the ranks agree bit for bit with each other but not
with a sum in rank order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from container.model.group import GroupBroken

BACKENDS: Final = ("gloo", "nccl")
LOOPBACK: Final = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_GRAPH_MIXING_SUPPORT": "0"}
DIGEST_BYTES: Final = 32


def connect(backend: str, rendezvous: str, rank: int, size: int, wait_s: float) -> TorchGroup:
    """Return the group of `size` ranks that meet at the path `rendezvous`; makes one collective to prove it.

    `wait_s` bounds this and every later call. Raises GroupBroken.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`{backend}` is not one of {', '.join(BACKENDS)}")
    os.environ.update(LOOPBACK)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store = dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=wait_s)
        )
    except RuntimeError as error:
        raise GroupBroken(f"the ranks did not connect ({type(error).__name__})") from None
    group = TorchGroup(backend, device)
    group.minimum(rank)
    return group


class TorchGroup:
    """Implements container.model.group.Group over the process's default process group."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self._in_rank_order = backend == "gloo"
        self._device = device
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; `tensor` may be changed."""
        if not tensor.numel():
            return tensor
        own = tensor.to(torch.float32).contiguous()
        if self._in_rank_order:
            parts = self._gather(own)
            own = parts[0]
            for part in parts[1:]:
                own += part
        else:
            self._call(lambda: dist.all_reduce(own))
        return own.to(tensor.dtype)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Return (rows, sum of columns) on rank 0, None elsewhere."""
        rows, columns = tensor.shape
        shapes = self._gather(torch.tensor([rows, columns], device=self._device))
        widths = [int(shape[1]) for shape in shapes]
        if any(int(shape[0]) != rows for shape in shapes):
            raise GroupBroken("the ranks do not compute the same")
        padded = tensor.new_zeros(rows, max(widths))
        padded[:, :columns] = tensor
        # an all-gather: NCCL has no gather of its own, and gloo's costs as much
        parts = self._gather(padded)
        if self.rank:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def minimum(self, value: int) -> int:
        """Return the smallest of the ranks' values, each in 64 bits with a sign."""
        smallest = torch.tensor([value], dtype=torch.int64, device=self._device)
        self._call(lambda: dist.all_reduce(smallest, op=dist.ReduceOp.MIN))
        return int(smallest)

    def agree(self, digest: bytes) -> None:
        """Raise GroupBroken unless every rank gave the same 32 bytes."""
        assert len(digest) == DIGEST_BYTES, "a digest has 32 bytes"
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(self._device)
        if any(not torch.equal(own, other) for other in self._gather(own)):
            raise GroupBroken("the ranks do not agree")

    def close(self) -> None:
        """Leave the process group; the other ranks' calls fail from here on."""
        dist.destroy_process_group()

    def _gather(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(parts, own))
        return parts

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # torch's text names addresses
            raise GroupBroken(f"a rank did not answer ({type(error).__name__})") from None
