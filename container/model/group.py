"""The ranks that hold one model together, as the model sees them: sums, gathers, agreement.

Owns: the Group protocol and the group of one.
Must not know: processes, shared memory, NCCL (container.ranks implements the protocol over them).
Invariant: every rank calls the same methods in the same order with the same shapes; whoever implements this
never answers from a rank that has failed: a call raises GroupBroken or the process ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class GroupBroken(RuntimeError):
    """A rank died, hangs, or disagrees; the group is of no further use."""


class Group(Protocol):
    """Collective operations of `size` ranks; this process is number `rank`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, the same bits on each; it may be summed in place.

        Summed in float32, in rank order, whatever the dtype.
        """

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Return the ranks' (rows, own columns) side by side on rank 0, None elsewhere.

        Widths may differ by rank; rows may not.
        """

    def minimum(self, value: int) -> int:
        """Return the smallest `value` given by any rank."""

    def agree(self, digest: bytes) -> None:
        """Raise GroupBroken unless every rank gave the same 32 bytes."""


class Solo:
    """The group of one rank: nothing to add, nothing to wait for."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        return tensor

    def minimum(self, value: int) -> int:
        return value

    def agree(self, digest: bytes) -> None:
        """One rank agrees with itself."""
