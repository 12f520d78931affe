"""A key kept for a child that restarts, by a parent that does not read it: one page behind a descriptor.

Owns: the page. Must not know: what the key opens, processes.
Invariant: between `keep` and `fetch` the key lies in that page alone, which no mapping of this process shows;
whoever has the descriptor has the key. A page takes one key, once.

    page = key 32 | 1 where a key was put

A source that gives its key once (`fd:`, `?unlink`, `invocation:`) would leave a restarted engine without one.
The supervisor keeps it so and hands the descriptor to each engine it starts. memfd_secret(2) takes the page
out of the kernel's own map: it is never swapped, and no other process reaches it through the kernel. Where
there is no such page, an ordinary sealed memory file stands in.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final

from model_package.refusal import KeyRefused, Refusal
from model_package.secret import KEY_BYTES

_SYS_MEMFD_SECRET: Final = 447  # the same number on x86_64 and aarch64
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Kept:
    """A descriptor of the page, close-on-exec: hand it on by `pass_fds`."""

    descriptor: int
    secret: bool  # in a memfd_secret page; else in a sealed memory file, which may be swapped

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class KeptSource:
    """The `Source` of a process that was handed the descriptor; it can be read again."""

    descriptor: int
    reusable: bool = True
    caution: str = ""

    def read(self) -> bytearray:
        return fetch(self.descriptor)


def keep(key: bytearray) -> Kept:
    """Copy the 32-byte `key`, which stays the caller's to wipe, into a page of its own. Raises KeyRefused."""
    if len(key) != KEY_BYTES:
        raise KeyRefused(Refusal.KEY_LENGTH_WRONG)
    kept = reserve()
    try:
        fill(kept.descriptor, key)
    except BaseException:
        kept.close()
        raise
    return kept


def reserve() -> Kept:
    """Return a page that has no key yet, for a child to `fill`. Raises KeyRefused."""
    descriptor = _LIBC.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if descriptor >= 0 and _has_page(descriptor):
        return Kept(descriptor, secret=True)
    if descriptor >= 0:
        os.close(descriptor)
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if not _has_page(descriptor):
        os.close(descriptor)
        raise KeyRefused(Refusal.KEY_NOT_WRITTEN)
    return Kept(descriptor, secret=False)


def fill(descriptor: int, key: bytearray) -> None:
    """Put the 32-byte `key` into a reserved page. Raises KeyRefused, also where the page has one."""
    if len(key) != KEY_BYTES:
        raise KeyRefused(Refusal.KEY_LENGTH_WRONG)
    taken = False
    with contextlib.suppress(OSError, ValueError):
        page = mmap.mmap(descriptor, mmap.PAGESIZE)
        with page, memoryview(page) as view:
            if not view[KEY_BYTES]:
                view[:KEY_BYTES] = key
                view[KEY_BYTES] = 1
                taken = True
    if not taken:
        raise KeyRefused(Refusal.KEY_NOT_WRITTEN)
    with contextlib.suppress(OSError):  # a memfd_secret page takes no seals
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


def fetch(descriptor: int) -> bytearray:
    """Return the kept key, which the caller wipes; the descriptor stays open. Raises KeyRefused."""
    key = bytearray(KEY_BYTES)
    found = False
    with contextlib.suppress(OSError, ValueError):  # ValueError: an empty file, or one shorter than a page
        page = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        with page, memoryview(page) as view:
            found = view[KEY_BYTES] == 1
            if found:
                key[:] = view[:KEY_BYTES]
    if not found:
        raise KeyRefused(Refusal.KEY_MISSING)
    return key


def _has_page(descriptor: int) -> bool:
    """Give the file its page; False where the kernel grants none, as beyond RLIMIT_MEMLOCK."""
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as page:
            page[KEY_BYTES] = 0
    except OSError:
        return False
    return True
