"""A sealed file's bytes: header, index, segments, chunks. FORMAT.md 5.1 to 5.4.

Owns: the header's fields and bounds, where each chunk lies, nonces and associated data. Does no I/O.
Must not know: keys, manifests, what a segment means.
Invariant: a parsed Header is within FORMAT.md 5.2; placed segments fill their file exactly.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from model_package.outcome import Outcome, PackageError

MAGIC: Final = b"SLDWT"
FORMAT: Final = 1
SUITE: Final = 1  # AES-256-GCM, SHA-256, HKDF-SHA256
HEADER_BYTES: Final = 64
DIGEST_BYTES: Final = 32
TAG_BYTES: Final = 16
ID_BYTES: Final = 16
LARGE_CHUNK_LOG2: Final = 20
SMALL_CHUNK_LOG2: Final = 12
CHUNK_LOG2S: Final = frozenset({SMALL_CHUNK_LOG2, LARGE_CHUNK_LOG2})
MAX_TENSORS: Final = 100_000
MAX_CHUNKS: Final = 524_288
MAX_TOC_BYTES: Final = 16 * 1024 * 1024
MIN_TOC_BYTES: Final = 2  # {}
MAX_FILE_BYTES: Final = 2**38
CHUNK_LABEL: Final = b"strongroom/package/v1/chunk\0"

_HEADER: Final = struct.Struct("<5sBBB16s16sIIQB7s")
_PLACE: Final = struct.Struct("<IQ")
_BOUND: Final = struct.Struct("<IQQB")


class Kind(enum.StrEnum):
    """What a sealed file holds."""

    TENSORS = "tensors"  # a safetensors file
    BLOB = "blob"  # any other


KIND_CODES: Final = {Kind.TENSORS: 1, Kind.BLOB: 2}
_KINDS: Final = {code: kind for kind, code in KIND_CODES.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """The first 64 bytes of a sealed file."""

    log2_chunk: int
    file_id: bytes
    package_id: bytes
    segments: int
    chunks: int
    toc_bytes: int  # plain
    kind: Kind

    @property
    def chunk_bytes(self) -> int:
        return 1 << self.log2_chunk

    @property
    def index_bytes(self) -> int:
        return DIGEST_BYTES * self.chunks

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            FORMAT,
            SUITE,
            self.log2_chunk,
            self.file_id,
            self.package_id,
            self.segments,
            self.chunks,
            self.toc_bytes,
            KIND_CODES[self.kind],
            bytes(7),
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one segment lies in its file."""

    number: int
    plain_bytes: int
    chunks: int
    first_chunk: int  # in the file
    offset: int  # of its first chunk, in the file


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """Return the header in the first 64 bytes of a file of `file_bytes`. Raises PackageError."""
    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        raise PackageError(Outcome.NOT_SEALED)
    _, version, suite, log2_chunk, file_id, package_id, segments, chunks, toc_bytes, code, reserved = (
        _HEADER.unpack(raw[:HEADER_BYTES])
    )
    if version != FORMAT:
        raise PackageError(Outcome.FORMAT_UNSUPPORTED)
    if suite != SUITE:
        raise PackageError(Outcome.SUITE_UNSUPPORTED)
    if log2_chunk not in CHUNK_LOG2S:
        raise PackageError(Outcome.CHUNK_SIZE_UNSUPPORTED)
    kind = _KINDS.get(code)
    toc_bounds = (MIN_TOC_BYTES, MAX_TOC_BYTES) if kind is Kind.TENSORS else (0, 0)
    in_bounds = (
        kind is not None
        and 1 <= segments <= MAX_TENSORS + 1
        and (kind is Kind.TENSORS or segments == 2)
        and segments <= chunks <= MAX_CHUNKS
        and toc_bounds[0] <= toc_bytes <= toc_bounds[1]
        and not any(reserved)
        and HEADER_BYTES + (DIGEST_BYTES + TAG_BYTES) * chunks + toc_bytes <= file_bytes
    )
    if not in_bounds or kind is None:
        raise PackageError(Outcome.HEADER_OUT_OF_BOUNDS)
    return Header(log2_chunk, file_id, package_id, segments, chunks, toc_bytes, kind)


def chunk_count(plain_bytes: int, log2_chunk: int) -> int:
    """Return how many chunks hold `plain_bytes`; an empty segment has one."""
    return max(1, -(-plain_bytes >> log2_chunk))


def toc_segment(header: Header) -> Segment:
    """Return segment 0, whose place the header alone decides."""
    count = chunk_count(header.toc_bytes, header.log2_chunk)
    return Segment(0, header.toc_bytes, count, 0, HEADER_BYTES + header.index_bytes)


def place(header: Header, lengths: Sequence[int], file_bytes: int) -> tuple[Segment, ...]:
    """Return all segments, given the plain bytes of those after the first.

    Raises PackageError with GEOMETRY_WRONG when they do not fill the file of `file_bytes` exactly.
    """
    segments = [toc_segment(header)]
    if len(lengths) != header.segments - 1:
        raise PackageError(Outcome.GEOMETRY_WRONG)
    for number, plain_bytes in enumerate(lengths, 1):
        last = segments[-1]
        segments.append(
            Segment(
                number,
                plain_bytes,
                chunk_count(plain_bytes, header.log2_chunk),
                last.first_chunk + last.chunks,
                last.offset + last.plain_bytes + TAG_BYTES * last.chunks,
            )
        )
    last = segments[-1]
    end = last.offset + last.plain_bytes + TAG_BYTES * last.chunks
    if last.first_chunk + last.chunks != header.chunks or end != file_bytes:
        raise PackageError(Outcome.GEOMETRY_WRONG)
    return tuple(segments)


def blob_bytes(header: Header, file_bytes: int) -> int:
    """Return the plain length of a blob, which its file's size decides. Raises PackageError."""
    plain = file_bytes - HEADER_BYTES - (DIGEST_BYTES + TAG_BYTES) * header.chunks
    if plain < 0:
        raise PackageError(Outcome.GEOMETRY_WRONG)
    return plain


def sealed_bytes(header: Header, lengths: Sequence[int]) -> int:
    """Return the size of the sealed file whose segments after the first hold `lengths` plain bytes."""
    return HEADER_BYTES + (DIGEST_BYTES + TAG_BYTES) * header.chunks + header.toc_bytes + sum(lengths)


def nonce(segment: int, chunk: int) -> bytes:
    return _PLACE.pack(segment, chunk)


def associated_data(header: bytes, segment: Segment, chunk: int) -> bytes:
    """Return what a chunk is bound to: its file's header, its place, its segment's length. FORMAT.md 5.4."""
    last = chunk == segment.chunks - 1
    return CHUNK_LABEL + header + _BOUND.pack(segment.number, chunk, segment.plain_bytes, last)
