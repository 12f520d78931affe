"""Host memory in pages of one size: zero when taken, wiped when given back, at addresses that never move.

Owns: arenas, wiping, how much freed memory is kept.
Must not know: what a page holds, who shares it.
Invariant: a page that nobody holds is zero; no more than `idle_bytes` of such pages stay resident.

    arena    one anonymous mapping | page | page | page | ... |, each page whole pages of the system
    idle     wiped and resident: taken again first      spare     given back to the system, address kept

Arenas rather than a buffer per page: addresses stay for good, a page costs no allocator's header or lock, and
what is not needed goes back to the system page by page, whatever its neighbours hold.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

import numpy as np

ARENA_BYTES: Final = 32 << 20  # address space only: memory comes when a page is written
IDLE_BYTES: Final = (
    64 << 20
)  # what freed memory saves its next user in page faults; beyond it the system gets it


class PageMemory:
    """Pages of `page_bytes`, named by their address. Not thread-safe."""

    def __init__(self, page_bytes: int, idle_bytes: int = IDLE_BYTES) -> None:
        assert page_bytes > 0, "a page holds something"
        self.page_bytes = page_bytes
        self._stride = -(-page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._idle_pages = idle_bytes // self._stride
        self._arenas: list[tuple[int, mmap.mmap]] = []  # by address
        self._held: dict[int, int] = {}  # address -> arena
        self._idle: list[tuple[int, int]] = []  # (address, arena), wiped and resident
        self._spare: list[tuple[int, int]] = []

    @property
    def held_pages(self) -> int:
        return len(self._held)

    @property
    def resident_bytes(self) -> int:
        """Memory of pages that are held, as far as they were written, and of idle ones."""
        return (len(self._held) + len(self._idle)) * self._stride

    def take(self) -> int:
        """Return the address of a page of zeros, aligned to the system's pages."""
        if not self._idle and not self._spare:
            self._map()
        address, arena = self._idle.pop() if self._idle else self._spare.pop()
        self._held[address] = arena
        return address

    def give_back(self, address: int) -> None:
        """Wipe the page; its address may be taken again."""
        arena = self._held.pop(address)
        if len(self._idle) < self._idle_pages:
            ctypes.memset(address, 0, self._stride)
            self._idle.append((address, arena))
            return
        # The mapping is private and of no file, so that what is not needed reads as zero from now on.
        base, mapping = self._arenas[arena]
        mapping.madvise(mmap.MADV_DONTNEED, address - base, self._stride)
        self._spare.append((address, arena))

    def close(self) -> None:
        """Free everything; no page may be held."""
        assert not self._held, "a page is still held"
        self._idle.clear()
        self._spare.clear()
        self._arenas.clear()  # unmapped once nothing refers to it

    def _map(self) -> None:
        pages = max(1, ARENA_BYTES // self._stride)
        mapping = mmap.mmap(-1, pages * self._stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = np.frombuffer(mapping, np.uint8).ctypes.data
        arena = len(self._arenas)
        self._arenas.append((base, mapping))
        self._spare.extend((base + page * self._stride, arena) for page in reversed(range(pages)))
