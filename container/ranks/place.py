"""Which rank a process is, of how many, and what it shares with the others.

Owns: the place of a process among the ranks, the making of its Group.
Must not know: models, plans, who starts whom. Imports torch only when a group is asked for.
Invariant: the same kind of group on every rank: rank 0 chooses, followers are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from container.ranks.exchange import Exchange

if TYPE_CHECKING:
    from container.model.group import Group

# Longest wait of a rank for the others while models load; the supervisor's patience with a load is the same.
LOAD_WAIT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Place:
    """One process's place. Without an exchange it is alone."""

    rank: int = 0
    size: int = 1
    exchange: Exchange | None = None
    rendezvous: str | None = None  # path of anonymous memory in which torch's process groups find each other

    def group(self, collectives: str = "auto") -> Group:
        """Return the Group of this place; call it once, in every rank, in the same order. Imports torch.

        `collectives` is "shared" (memory, for models on the CPU), "gloo", "nccl", or "auto": shared.
        """
        from container.model.group import Solo

        if self.exchange is None:
            return Solo()
        if collectives in ("auto", "shared"):
            from container.ranks.reduce import SharedMemoryGroup

            return SharedMemoryGroup(self.exchange)
        from container.ranks.torch_group import connect

        assert self.rendezvous is not None, "ranks that are not alone have somewhere to meet"
        return connect(collectives, self.rendezvous, self.rank, self.size, self.exchange.wait_s)

    def serving(self, wait_s: float) -> None:
        """From now on a rank that keeps the others waiting for `wait_s` is lost."""
        if self.exchange is not None:
            self.exchange.wait_s = wait_s


ALONE: Final = Place()
