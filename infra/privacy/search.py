"""Looking for canaries: in bytes, in files, in the memory of processes, plain and in other encodings.

Owns: how a canary may be written. Must not know: what the places are, how many hits are too many.
Invariant: a file or page that cannot be read is reported, never passed over.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.privacy.plan import DIGITS

PIECE_BYTES: Final = 16 * 1024 * 1024
OVERLAP_BYTES: Final = 1024
MAP: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)$")


@dataclass(frozen=True, slots=True)
class Found:
    """Canaries in one place: their numbers, those in another encoding counted as a whole."""

    place: str
    numbers: frozenset[str]
    encoded: int = 0

    def __bool__(self) -> bool:
        return bool(self.numbers or self.encoded)


class Search:
    """Knows one run's mark in every encoding."""

    def __init__(self, mark: str) -> None:
        self._plain = re.compile(re.escape(mark.encode()) + rb"(\d{%d})" % DIGITS)
        self._encoded = encodings(mark)

    def bytes(self, place: str, data: bytes) -> Found:
        """Return what `data` holds."""
        numbers = frozenset(match.decode() for match in self._plain.findall(data))
        return Found(place, numbers, sum(data.count(form) for form in self._encoded))

    def files(self, paths: Iterable[Path]) -> Iterator[Found]:
        """Yield what each file holds, its name included."""
        for path in paths:
            yield self.bytes(str(path), str(path).encode() + b"\0" + path.read_bytes())

    def memory(self, pids: Iterable[int]) -> Iterator[Found]:
        """Yield what the private writable memory of each process holds; raises OSError."""
        for pid in pids:
            numbers: set[str] = set()
            encoded = 0
            for piece in _memory(pid):
                found = self.bytes("", piece)
                numbers |= found.numbers
                encoded += found.encoded
            yield Found(program(pid), frozenset(numbers), encoded)


def encodings(mark: str) -> tuple[bytes, ...]:
    """Return the mark as hexadecimal, base64 at every offset, wider characters, and backwards."""
    plain = mark.encode()
    shifted = []
    for before in range(3):
        # whole groups of three from the first that holds nothing of the neighbours
        skip = -before % 3
        inner = plain[skip : skip + (len(plain) - skip) // 3 * 3]
        shifted.append(base64.b64encode(inner))
    wide = [mark.encode("utf-16-le"), mark.encode("utf-32-le")]
    return (plain.hex().encode(), plain.hex().upper().encode(), *shifted, *wide, plain[::-1])


def program(pid: int) -> str:
    """Return what a process runs: the module behind `-m`, or its program."""
    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return words[words.index("-m") + 1] if "-m" in words[:-1] else words[0]


def _memory(pid: int) -> Iterator[bytes]:
    """Yield the readable private memory of a process that is writable: stacks, heaps, what is computed in."""
    regions = [MAP.match(line) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for region in regions:
            assert region is not None, "the kernel writes maps in one form"
            if not region[3].startswith("rw") or region[5] in ("[vvar]", "[vsyscall]"):
                continue
            begin, end = int(region[1], 16), int(region[2], 16)
            for at in range(begin, end, PIECE_BYTES):
                memory.seek(at)
                wanted = min(PIECE_BYTES + OVERLAP_BYTES, end - at)
                try:
                    yield memory.read(wanted)
                except OSError:  # unmapped since
                    break
