"""The latest time at which this installation is known to have started: a clock that was turned back is seen.

Owns: one small file in a state directory. Must not know: licences.
Invariant: the recorded time never falls; a damaged record refuses the start instead of counting as none.

Root of the host can remove the file or set the clock between two starts; KEYS.md says what that means.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

from model_package.refusal import KeyRefused, Refusal

RECORD: Final = "last-start"
MAX_RECORD_BYTES: Final = 64
TOLERANCE_S: Final = 3600  # what a time service may correct between two starts; FORMAT.md 4.3 grants the same

_FORM: Final = re.compile(rb"strongroom clock 1 (0|[1-9][0-9]{0,15})\n")


def check(state: Path, now_s: int) -> None:
    """Return if `now_s` is not behind the recorded start. Raises KeyRefused with CLOCK_*."""
    recorded_s = _recorded(state)
    if recorded_s is not None and now_s + TOLERANCE_S < recorded_s:
        raise KeyRefused(Refusal.CLOCK_TURNED_BACK)


def record(state: Path, now_s: int) -> None:
    """Record a start at `now_s`, on the disk; an earlier time leaves the record as it is.

    Call it once the licence's dates hold: a clock far ahead then fails as expired and leaves no mark.
    Raises KeyRefused with CLOCK_*.
    """
    recorded_s = _recorded(state)
    if recorded_s is not None and recorded_s >= now_s:
        return
    # A name of its own: containers that share the directory are all process 1, one may have been killed.
    partial = state / f"{RECORD}.{os.urandom(8).hex()}.partial"
    try:
        with partial.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(f"strongroom clock 1 {now_s}\n".encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(state / RECORD)
        written = True
    except OSError:
        written = False
    if not written:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise KeyRefused(Refusal.CLOCK_STATE_UNWRITABLE)


def _recorded(state: Path) -> int | None:
    """Return the recorded time in seconds since 1970, None where there is no record yet."""
    content: bytes | None
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(state / RECORD, flags)
        try:
            content = os.read(descriptor, MAX_RECORD_BYTES + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError:
        content = None
    form = _FORM.fullmatch(content) if content is not None else None
    if form is None:
        raise KeyRefused(Refusal.CLOCK_STATE_MALFORMED)
    return int(form[1])
