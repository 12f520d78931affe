"""Key memory: where a key may lie, how it is wiped, what the process gives up before one arrives.

Owns: wiping, locking pages, switching dumps off. Must not know: what a key opens or where it comes from.
Invariant: a key lies in a bytearray that one function owns and wipes; nothing here copies, shows or logs it.

CPython cannot wipe bytes, str or os.environ: such copies live on in freed memory. A bytearray can be wiped;
tests/model_package/test_secret_memory.py counts the copies left in a process's writable memory.
Root on this machine reads all of it while the key is in use: see KEYS.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from model_package.worded import WordedError

KEY_BYTES: Final = 32  # a data key and an X25519 private key alike

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_MADV_DONTDUMP: Final = 16
_BYTES_HEAD_BYTES: Final = bytes.__basicsize__ - 1  # a bytes object's header; its content follows it
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class HardeningError(WordedError):
    """The kernel kept dumps of this process possible; no key may be read then."""

    message = "the process could not be made undumpable"
    hint = "run on Linux without a policy that forbids `prctl` or `setrlimit`"


@dataclass(frozen=True, slots=True)
class Held:
    """What the kernel granted for the pages of one key."""

    locked: bool  # never written to swap
    undumped: bool  # left out of core files


def harden_process() -> None:
    """Make this process undumpable, before its first key arrives.

    From then on same-user ptrace and /proc/PID/mem are refused, and there is no core file. Root is not bound.
    Raises HardeningError. Source: prctl(2), PR_SET_DUMPABLE.
    """
    if _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 or dumpable():
        raise HardeningError
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limited = True
    except (OSError, ValueError):
        limited = False
    if not limited:
        raise HardeningError


def dumpable() -> bool:
    """True while this process may be dumped or traced by its own user."""
    return bool(_LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0))


def wipe(key: bytearray) -> None:
    """Overwrite `key` with zeros in place; its length stays, so that no reallocation leaves a copy."""
    if key:
        ctypes.memset(_address(key), 0, len(key))


@contextlib.contextmanager
def wiping(key: bytearray) -> Iterator[bytearray]:
    """Hold `key`'s pages while the block runs and wipe it afterwards, however the block ends."""
    try:
        hold(key)
        yield key
    finally:
        wipe(key)


def hold(key: bytearray) -> Held:
    """Keep the pages under `key` out of swap and core files, where the kernel allows it.

    They stay so for the life of the process: locks do not nest, and a page may hold a second key by then.
    """
    if not key:
        return Held(locked=False, undumped=False)
    first = _address(key) // mmap.PAGESIZE * mmap.PAGESIZE
    end = _address(key) + len(key)
    start, length = ctypes.c_void_p(first), ctypes.c_size_t(end - first)
    return Held(
        locked=_LIBC.mlock(start, length) == 0,
        undumped=_LIBC.madvise(start, length, _MADV_DONTDUMP) == 0,
    )


def take_over(content: bytes) -> bytearray:
    """Move `content`, fresh from a library that returns bytes, into a bytearray, and wipe the original.

    Only for a value nobody else refers to: bytes are shared freely, and every holder would see zeros. The one
    place that writes into an immutable object, because cryptography returns private keys and opened HPKE
    messages as bytes alone.
    """
    key = bytearray(content)
    if len(content) > 1:  # the interpreter shares the empty one and those of one byte
        ctypes.memset(id(content) + _BYTES_HEAD_BYTES, 0, len(content))
    return key


def _address(key: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(key))
