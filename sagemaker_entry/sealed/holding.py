"""What PID 1 holds for a sealed package while engines and fronts come and go.

Owns: the descriptors, and keeping what a key source gives only once.
Must not know: what a key opens: it reads 32 bytes at most, wipes them, and parses nothing.
Invariant: the process is undumpable before a key reaches it, and holds none afterwards but in a kept page.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Final

from container.ranks.door import make_door
from container.ranks.heartbeat import read_only
from model_package import keeping, sources
from model_package.refusal import KeyRefused
from model_package.secret import harden_process, wiping
from sagemaker_entry.sealed import board
from sagemaker_entry.sealed.plan import Plan, encode

INVOCATION: Final = "invocation:"


@dataclass(frozen=True, slots=True)
class Held:
    """Descriptors by the name of the argument that tells a child of them."""

    engine: dict[str, int]
    front: dict[str, int]


NOTHING: Final = Held({}, {})  # of a model that is not sealed


def hold(plan: Plan, environment: MutableMapping[str, str]) -> Held:
    """Return what the children are given; a source that gives its key once is read now. Raises KeyRefused."""
    harden_process()
    kept = _keep(plan.key, environment)
    plan_fd = os.memfd_create("plan", os.MFD_CLOEXEC)
    os.write(plan_fd, encode(plan))
    board_fd = board.create()
    front_door, engine_door = make_door()
    engine = {"--plan-fd": plan_fd, "--board-fd": board_fd, "--unlock-fd": engine_door}
    if kept is not None:
        engine["--key-fd"] = kept.descriptor
    return Held(engine, {"--board-fd": read_only(board_fd), "--unlock-fd": front_door})


def _keep(uri: str, environment: MutableMapping[str, str]) -> keeping.Kept | None:
    """Return a page for the key, None where the source can be read again."""
    if uri == INVOCATION:
        return keeping.reserve()
    where = sources.inner(uri)
    if where is None:
        return None
    try:
        source = sources.source(where, environment)
    except KeyRefused:
        return None  # the engine refuses it in the same words
    if source.reusable:
        return None
    with wiping(source.read()) as key:
        return keeping.keep(key)
