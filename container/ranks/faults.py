"""Why a process of the engine ends, in a closed word and a line of our own.

Owns: the mapping from an exception to its cause. Must not know: what the process does with it.
Invariant: no text of a foreign exception is passed on; it may hold anything.
"""

from __future__ import annotations

import sys
from typing import Final

from container.ranks.assembly import StartFailed
from container.ranks.exchange import ExchangeBroken
from container.ranks.followers import RankLost
from container.ranks.heartbeat import StartFault
from container.ranks.lockdown import LockdownFailed
from container.ranks.memory import NoSharedWords
from container.ranks.process import where
from container.ranks.ranked import RanksBroken
from container.ranks.ring import RingBroken

# How the two allocators name a lack of memory; they share no exception type.
OUT_OF_MEMORY_SIGNS: Final = ("can't allocate memory", "out of memory")


def diagnose(error: BaseException) -> tuple[StartFault, str]:
    """Return the closed cause of `error` and words of our own."""
    while isinstance(error, RanksBroken) and error.__context__ is not None:
        error = error.__context__  # the failure after which nothing may be run
    if isinstance(error, StartFailed):
        return error.fault, str(error)
    if isinstance(error, LockdownFailed):
        return StartFault.LOCKDOWN, str(error)
    if isinstance(error, NoSharedWords):
        return StartFault.BAD_CONFIG, f"`tensor_parallel` above 1: {error.strerror}"
    if isinstance(error, _group_errors()):
        return StartFault.RANK_LOST, str(error)
    place = f"{type(error).__name__} at {where(error.__traceback__)}"
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS):
        return StartFault.OUT_OF_MEMORY, place
    return StartFault.INTERNAL, place


def _group_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that mean: another rank is lost. All carry texts of our own."""
    group = sys.modules.get(
        "container.model.group"
    )  # imports torch: looked at only where it is there already
    return (ExchangeBroken, RingBroken, RankLost) + ((group.GroupBroken,) if group else ())
