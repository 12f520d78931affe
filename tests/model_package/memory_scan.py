"""Counts copies of secrets in a process's own writable memory.

Owns: the search. Must not know: which secrets. Invariant: the search makes no copy that it could find itself:
what it looks for is given masked, and memory is read into one window that it leaves out and masks in place.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

WINDOW_BYTES = 1 << 20
_MASK = 0x5A
_MASKED = bytes(byte ^ _MASK for byte in range(256))


def masked(secret: bytes | bytearray) -> str:
    """Return `secret` in a form that may stay in memory while it is searched for."""
    return bytes(secret).translate(_MASKED).hex()


def unmasked(text: str) -> bytearray:
    """Return the secret of `masked`, in a bytearray, leaving no other copy."""
    hidden = bytearray.fromhex(text)
    for place, byte in enumerate(hidden):
        hidden[place] = byte ^ _MASK
    return hidden


def copies(secrets: dict[str, str]) -> dict[str, int]:
    """Return how often each of the masked `secrets` lies in writable memory of this process."""
    window = mmap.mmap(-1, WINDOW_BYTES)
    here = ctypes.addressof(ctypes.c_char.from_buffer(window))
    found = dict.fromkeys(secrets, 0)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        for start, end in _writable():
            if start <= here < end:  # neighbouring maps may be listed as one
                _count(memory, start, here, window, secrets, found)
                start = here + WINDOW_BYTES
            _count(memory, start, end, window, secrets, found)
    finally:
        os.close(memory)
    return found


def _writable() -> list[tuple[int, int]]:
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        place, mode, *_ = line.split()
        if "w" in mode:
            start, end = (int(edge, 16) for edge in place.split("-"))
            ranges.append((start, end))
    return ranges


def _count(
    memory: int, start: int, end: int, window: mmap.mmap, secrets: dict[str, str], found: dict[str, int]
) -> None:
    overlap = max(len(secret) for secret in secrets.values()) // 2 - 1  # a secret may lie across two windows
    while start < end:
        try:
            length = os.preadv(memory, [memoryview(window)[: end - start]], start)
        except OSError:  # pages the kernel does not give out
            return
        np.frombuffer(window, np.uint8)[:] ^= _MASK
        for name, secret in secrets.items():
            place = window.find(bytes.fromhex(secret), 0, length)
            while place >= 0:
                found[name] += 1
                place = window.find(bytes.fromhex(secret), place + 1, length)
        if start + length >= end:
            return
        start += length - overlap
