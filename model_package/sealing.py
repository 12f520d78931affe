"""Sealing one file: plain bytes in, sealed bytes out, a few chunks in memory. FORMAT.md 5.

Owns: cutting a source file into segments, encrypting, the index, the digests. Must not know: what a manifest
says, resuming, who the key is for.
Invariant: a file key seals one file once; the plain bytes are read once and never written.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from model_package import layout, schedule, storage, toc
from model_package.layout import DIGEST_BYTES, HEADER_BYTES, TAG_BYTES, Header, Kind, Segment
from model_package.manifest import FileEntry
from model_package.outcome import PackageError

SAFETENSORS_SUFFIX: Final = ".safetensors"
SAFETENSORS_LENGTH_BYTES: Final = 8
RUN_CHUNKS: Final = 8
_HASHED_BYTES: Final = 1 << layout.LARGE_CHUNK_LOG2

_staging: Final = threading.local()


class SealError(Exception):
    """Something that cannot be sealed, or not here; the text names the rule and the file, never content."""


@dataclass(frozen=True, slots=True)
class Source:
    """A plain file to seal and how it is cut."""

    name: str  # in the package
    path: Path
    kind: Kind
    stamp: tuple[int, int, int]  # size, changed, inode changed: it must be the same file afterwards
    toc: bytes
    data_offset: int
    lengths: tuple[int, ...]  # of the segments after the first

    @property
    def plain_bytes(self) -> int:
        return len(self.toc) + sum(self.lengths)


def read_source(name: str, path: Path) -> Source:
    """Return how the file at `path` will be sealed as `name`. Raises SealError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise SealError(f"`{name}` is not a regular file")
        if not name.endswith(SAFETENSORS_SUFFIX):
            return Source(name, path, Kind.BLOB, _stamp(fd), b"", 0, (found.st_size,))
        table = _read_table(name, fd, found.st_size)
        lengths = _lengths(name, table)
        offset = SAFETENSORS_LENGTH_BYTES + len(table)
        if offset + sum(lengths) != found.st_size:
            raise SealError(f"`{name}` is not as long as its safetensors header says")
        return Source(name, path, Kind.TENSORS, _stamp(fd), table, offset, lengths)
    finally:
        os.close(fd)


def seal_file(
    directory: int,
    source: Source,
    data_key: bytearray,
    package_id: bytes,
    file_id: bytes,
    log2_chunk: int,
    threads: int,
    progress: Callable[[int], None],
) -> FileEntry:
    """Seal `source` into `directory` as `<file_id>.sealed` and return its manifest entry.

    `file_id` must be fresh: see FORMAT.md 5.4. `progress` gets plain bytes sealed since the last call. Raises
    SealError, OSError; the file appears complete or not at all.
    """
    header = _header(source, package_id, file_id, log2_chunk)
    size = layout.sealed_bytes(header, source.lengths)
    if size > layout.MAX_FILE_BYTES:
        raise SealError(f"`{source.name}` is too large to seal\nhint: divide it into several files")
    cipher = schedule.file_cipher(data_key, package_id, file_id)
    name = f"{file_id.hex()}.sealed"
    plain = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with storage.completed(directory, name) as sealed:
            writer = _Writer(source, header, cipher, plain, sealed)
            writer.write_chunks(layout.place(header, source.lengths, size), threads, progress)
            if _stamp(plain) != source.stamp:
                raise SealError(f"`{source.name}` changed while it was sealed")
            index_sha256 = writer.write_index()
            sha256 = file_sha256(sealed, size)
    finally:
        os.close(plain)
    return FileEntry(
        file_id=file_id.hex(),
        index_sha256=index_sha256,
        kind=source.kind,
        name=source.name,
        sha256=sha256,
        size=size,
    )


class _Writer:
    """The state of one file being sealed; chunks may be written by several threads, each its own."""

    def __init__(self, source: Source, header: Header, cipher: AESGCM, plain: int, sealed: int) -> None:
        self._source = source
        self._header = header
        self._raw_header = header.pack()
        self._cipher = cipher
        self._plain = plain
        self._sealed = sealed
        self._index = bytearray(header.index_bytes)

    def write_chunks(
        self, segments: tuple[Segment, ...], threads: int, progress: Callable[[int], None]
    ) -> None:
        if threads == 1:
            for run in self._runs(segments):
                progress(self._write_run(run))
            return
        with ThreadPoolExecutor(threads, "seal") as executor:
            pending: list[Future[int]] = []
            for run in self._runs(segments):
                pending.append(executor.submit(self._write_run, run))
                if (
                    len(pending) == 4 * threads
                ):  # a bound on what waits, and on what a failure leaves to finish
                    progress(pending.pop(0).result())
            wait(pending)
            for future in pending:
                progress(future.result())

    def write_index(self) -> str:
        """Write header and index; return their SHA-256, the manifest's `index_sha256`."""
        storage.write_at(self._sealed, 0, self._raw_header)
        storage.write_at(self._sealed, HEADER_BYTES, self._index)
        digest = hashlib.sha256(self._raw_header)
        digest.update(self._index)
        return digest.hexdigest()

    def _runs(self, segments: tuple[Segment, ...]) -> Iterator[list[tuple[Segment, int, int]]]:
        """Yield lists of (segment, chunk, offset of its plain bytes), each for one thread to do at once."""
        run: list[tuple[Segment, int, int]] = []
        offset = self._source.data_offset
        for segment in segments:
            for chunk in range(segment.chunks):
                run.append((segment, chunk, offset + chunk * self._header.chunk_bytes))
                if len(run) == RUN_CHUNKS:
                    yield run
                    run = []
            offset += segment.plain_bytes if segment.number else 0
        if run:
            yield run

    def _write_run(self, run: list[tuple[Segment, int, int]]) -> int:
        return sum(self._write_chunk(*each) for each in run)

    def _write_chunk(self, segment: Segment, chunk: int, plain_offset: int) -> int:
        size = self._header.chunk_bytes
        length = min(size, segment.plain_bytes - chunk * size)
        plain, sealed = _stages(length)
        if segment.number == 0:
            plain[:] = self._source.toc[chunk * size : chunk * size + length]
        else:
            _read_plain(self._source.name, self._plain, plain_offset, plain)
        bound = layout.associated_data(self._raw_header, segment, chunk)
        self._cipher.encrypt_into(layout.nonce(segment.number, chunk), plain, bound, sealed)
        storage.write_at(self._sealed, segment.offset + chunk * (size + TAG_BYTES), sealed)
        place = (segment.first_chunk + chunk) * DIGEST_BYTES
        self._index[place : place + DIGEST_BYTES] = hashlib.sha256(sealed).digest()
        return length


def _header(source: Source, package_id: bytes, file_id: bytes, log2_chunk: int) -> Header:
    lengths = (len(source.toc), *source.lengths)
    chunks = sum(layout.chunk_count(length, log2_chunk) for length in lengths)
    if len(lengths) > layout.MAX_TENSORS + 1 or chunks > layout.MAX_CHUNKS:
        raise SealError(f"`{source.name}` has too many tensors or chunks\nhint: divide it into several files")
    return Header(log2_chunk, file_id, package_id, len(lengths), chunks, len(source.toc), source.kind)


def _read_table(name: str, fd: int, size: int) -> bytes:
    length = SAFETENSORS_LENGTH_BYTES
    if size >= length:
        length = int.from_bytes(storage.read_at(fd, 0, SAFETENSORS_LENGTH_BYTES), "little")
        if layout.MIN_TOC_BYTES <= length <= min(size - SAFETENSORS_LENGTH_BYTES, layout.MAX_TOC_BYTES):
            return storage.read_at(fd, SAFETENSORS_LENGTH_BYTES, length)
    raise SealError(f"`{name}` is not safetensors, or its header exceeds {layout.MAX_TOC_BYTES} bytes")


def _lengths(name: str, table: bytes) -> tuple[int, ...]:
    try:
        return tuple(entry.data_bytes for entry in toc.parse(table, None))
    except PackageError:
        pass
    raise SealError(f"`{name}` has a safetensors header that is refused\nhint: see FORMAT.md 5.5")


def _read_plain(name: str, fd: int, offset: int, out: memoryview) -> None:
    try:
        storage.read_into(fd, offset, out)
        complete = True
    except PackageError:
        complete = False
    if not complete:
        raise SealError(f"`{name}` changed while it was sealed")


def _stamp(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _stages(length: int) -> tuple[memoryview, memoryview]:
    """Return this thread's memory for one chunk, plain and sealed."""
    if not hasattr(_staging, "plain"):
        _staging.plain = bytearray(1 << layout.LARGE_CHUNK_LOG2)
        _staging.sealed = bytearray((1 << layout.LARGE_CHUNK_LOG2) + TAG_BYTES)
    return memoryview(_staging.plain)[:length], memoryview(_staging.sealed)[: length + TAG_BYTES]


def file_sha256(fd: int, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes, hex. Raises PackageError where there are fewer."""
    digest = hashlib.sha256()
    stage = memoryview(bytearray(_HASHED_BYTES))
    for offset in range(0, size, _HASHED_BYTES):
        part = stage[: min(_HASHED_BYTES, size - offset)]
        storage.read_into(fd, offset, part)
        digest.update(part)
    return digest.hexdigest()
