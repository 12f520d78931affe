"""Anonymous memory that several processes share, and waiting for a word in it to change.

Owns: making and mapping such memory, 32-bit words in it, the futex.
Must not know: what the words mean, plans, tensors. No torch.
Invariant: a word is stored and loaded whole; what a process wrote before it stored a word is visible to
whoever has read that store. This is x86-64's store order, so other processors are refused, not hoped for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import time
from typing import Final

WORD_BYTES: Final = 4
WORD_MASK: Final = 0xFFFF_FFFF
SYS_FUTEX: Final = 202
FUTEX_WAIT: Final = 0  # not the private kind: the waiters are in other processes
FUTEX_WAKE: Final = 1
EVERY_WAITER: Final = 0x7FFF_FFFF
LONGEST_WAIT_S: Final = 3600.0  # one system call's; whoever waits for ever calls again


class NoSharedWords(OSError):
    """This machine cannot share words between processes the way this room does."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_libc: Final = ctypes.CDLL(None, use_errno=True)


def make(name: str, size_bytes: int) -> int:
    """Return a descriptor of new, zeroed memory of `size_bytes` that nobody can shrink under a reader.

    `name` shows in /proc alone. Raises NoSharedWords on processors other than x86-64, and OSError.
    """
    if platform.machine() != "x86_64" or not hasattr(os, "memfd_create"):
        raise NoSharedWords(errno.ENOSYS, "several ranks need Linux on x86-64")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class Memory:
    """A mapping of such a descriptor: bytes, and words that can be waited for."""

    def __init__(self, fd: int) -> None:
        """Map all of `fd`; the descriptor may be closed afterwards."""
        self.map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.bytes = memoryview(self.map)
        self._words = self.bytes.cast("I")
        anchor = ctypes.c_char.from_buffer(self.map)
        self._address = ctypes.addressof(anchor)
        del anchor  # or the map could never be closed

    def load(self, word: int) -> int:
        """Return the word with index `word`."""
        return self._words[word]

    def store(self, word: int, value: int) -> None:
        """Store `value`, of which the low 32 bits count."""
        self._words[word] = value & WORD_MASK

    def wake(self, word: int) -> None:
        """Wake all processes that wait for `word` to change."""
        _libc.syscall(SYS_FUTEX, ctypes.c_void_p(self._at(word)), FUTEX_WAKE, EVERY_WAITER, None, None, 0)

    def wait(self, word: int, seen: int, wait_s: float) -> None:
        """Sleep while `word` is `seen`, for `wait_s` at most; may return early, so look again.

        Raises OSError for what is neither a change, a signal nor the time being over.
        """
        wait_s = min(max(wait_s, 0.0), LONGEST_WAIT_S)
        limit = _Timespec(int(wait_s), int(wait_s % 1 * 1e9))
        address = ctypes.c_void_p(self._at(word))
        result = _libc.syscall(SYS_FUTEX, address, FUTEX_WAIT, seen, ctypes.byref(limit), None, 0)
        if result < 0:
            number = ctypes.get_errno()
            if number not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
                raise OSError(number, "futex wait was refused")

    def wait_beyond(self, word: int, wanted: int, spin_s: float, deadline_s: float | None) -> bool:
        """Wait until the counter in `word` has reached `wanted`; False when `deadline_s` passed first.

        The counter wraps at 32 bits and is less than 2**31 away. Looks again and again for `spin_s` (two
        processes on two cores meet within microseconds), then sleeps. No deadline: waits for ever.
        """
        words = self._words
        if reached(words[word], wanted):
            return True
        spin_until_s = time.monotonic() + spin_s
        while time.monotonic() < spin_until_s:
            if reached(words[word], wanted):
                return True
        while not reached(seen := words[word], wanted):
            left_s = LONGEST_WAIT_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0.0:
                return False
            self.wait(word, seen, left_s)
        return True

    def close(self) -> None:
        """Unmap; views of `bytes` must be gone."""
        self._words.release()
        self.bytes.release()
        self.map.close()

    def _at(self, word: int) -> int:
        assert 0 <= word < len(self._words), "a word lies inside the memory"
        return self._address + word * WORD_BYTES


def reached(counter: int, wanted: int) -> bool:
    """Return whether a 32-bit counter that may have wrapped is at or past `wanted`."""
    return (counter - wanted) & WORD_MASK < 1 << 31
