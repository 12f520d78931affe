"""What rank 0 tells the followers, as bytes: a plan without what only sampling needs, a reset, the end.

Owns: the layout of a command. Must not know: how commands travel.
Invariant: decoding refuses every byte string that encoding did not make; a decoded plan equals the encoded
one in all that decides keys and values, and carries no history, seed or sampling parameter.

    | magic u32 | kind u32 | step number i64 | lengths u32 x 11 |
    | slots | starts | counts | flags | tokens | drafts | truncates | releases | assigns x 3 | table | saves |
                                                                                                  int32 each
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Final

from container.engine.request import SamplingParams
from container.engine.step import SlotAssignment, StepPlan, ints

MAGIC: Final = 0x53475032  # "SGP2": another layout gets another number
PARTS: Final = 11
HEAD: Final = struct.Struct(f"<IIq{PARTS}I")
INT_BYTES: Final = 4
ASSIGN_INTS: Final = 3  # slot, prompt_tokens, cached_tokens
NO_SAMPLING: Final = SamplingParams(temperature=0.0)  # followers never sample

assert sys.byteorder == "little" and array("i").itemsize == INT_BYTES, (
    "plans are copied as they lie in memory"
)


class Order(enum.IntEnum):
    """What a follower does."""

    RUN = 1
    RESET = 2
    CLOSE = 3


class BadCommand(ValueError):
    """Bytes that are no command of this version: rank 0 and this rank do not run the same code."""


@dataclass(frozen=True, slots=True)
class Command:
    """One order; `plan` is there for RUN alone."""

    order: Order
    plan: StepPlan | None = None


def encode(order: Order, plan: StepPlan | None = None) -> bytes:
    """Return the command's bytes. `plan` is given for RUN and for nothing else."""
    assert (plan is not None) == (order is Order.RUN), "a plan belongs to RUN"
    if plan is None:
        return HEAD.pack(MAGIC, order, 0, *(0 for _ in range(PARTS)))
    assigns = ints()
    for assignment in plan.assigns:
        assigns.extend((assignment.slot, assignment.prompt_tokens, assignment.cached_tokens))
    parts = (
        *(plan.slots, plan.starts, plan.counts, plan.flags, plan.tokens),
        *(plan.drafts, plan.truncates, plan.releases, assigns, plan.table, plan.saves),
    )
    head = HEAD.pack(MAGIC, order, plan.number, *(len(part) for part in parts))
    return b"".join((head, *(part.tobytes() for part in parts)))


def decode(data: bytes | bytearray | memoryview) -> Command:
    """Return the command in `data`; raises BadCommand. Nothing refers to `data` afterwards."""
    view = memoryview(data)
    if len(view) < HEAD.size:
        raise BadCommand(f"a command of {len(view)} bytes is cut short")
    magic, order, number, *lengths = HEAD.unpack_from(view)
    if magic != MAGIC or order not in Order._value2member_map_:
        raise BadCommand("a command of another version")
    if len(view) != HEAD.size + INT_BYTES * sum(lengths):
        raise BadCommand(f"a command of {len(view)} bytes does not have the length it says")
    if order != Order.RUN:
        if any(lengths) or number:
            raise BadCommand("a plan where none belongs")
        return Command(Order(order))
    parts: list[array[int]] = []
    at = HEAD.size
    for length in lengths:
        part = ints()
        part.frombytes(view[at : at + length * INT_BYTES])
        parts.append(part)
        at += length * INT_BYTES
    return Command(Order.RUN, _plan(number, parts))


def _plan(number: int, parts: list[array[int]]) -> StepPlan:
    slots, starts, counts, flags, tokens, drafts, truncates, releases, assigns, table, saves = parts
    rows = len(slots)
    if any(len(part) != rows for part in (starts, counts, flags)):
        raise BadCommand("rows of a plan differ in number")
    if len(drafts) not in (0, rows) or len(truncates) % 2:
        raise BadCommand("drafts of a plan are cut short")
    if len(assigns) % ASSIGN_INTS or len(table) % 3 or len(saves) % 3:
        raise BadCommand("a triple of a plan is cut short")
    return StepPlan(
        number,
        slots=slots,
        starts=starts,
        counts=counts,
        flags=flags,
        tokens=tokens,
        drafts=drafts,
        truncates=truncates,
        releases=releases,
        assigns=[
            SlotAssignment(slot, NO_SAMPLING, (), prompt_tokens, cached_tokens, ints())
            for slot, prompt_tokens, cached_tokens in zip(*(iter(assigns),) * ASSIGN_INTS, strict=True)
        ],
        table=table,
        saves=saves,
    )
