"""One sealed file: chunks proved against the index and opened into the caller's memory. FORMAT.md 5.

Owns: the descriptor, header and index of one file, reading and opening chunk runs. Must not know: where keys
come from, what a tensor is.
Invariant: no byte of a chunk is handed over before its digest and its tag held; what a failed call wrote into
the caller's memory is zeros.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from concurrent.futures import Executor, Future, wait
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from model_package import layout, storage
from model_package.layout import DIGEST_BYTES, HEADER_BYTES, TAG_BYTES, Header, Segment
from model_package.manifest import FileEntry
from model_package.outcome import Outcome, PackageError

RUN_CHUNKS: Final = 8  # that one thread takes at once: 8 MiB, so that handing over costs nothing beside it
PROVE_BYTES: Final = 1 << layout.LARGE_CHUNK_LOG2

_staging: Final = threading.local()


class SealedFile:
    """A file whose size, header and index are what the manifest says; its chunks are proved when read."""

    def __init__(self, fd: int, entry: FileEntry, package_id: bytes) -> None:
        """Take over `fd`. Raises PackageError: FORMAT.md 8, step 4; the descriptor is closed then."""
        self._fd = fd
        self.entry = entry
        try:
            if storage.size_of(fd) != entry.size:
                raise PackageError(Outcome.SIZE_WRONG)
            raw = storage.read_at(fd, 0, HEADER_BYTES)
            self.header: Header = layout.parse_header(raw, entry.size)
            ids = (self.header.file_id, self.header.package_id, self.header.kind)
            if ids != (bytes.fromhex(entry.file_id), package_id, entry.kind):
                raise PackageError(Outcome.HEADER_MISMATCH)
            self._raw_header = raw
            self._index = storage.read_at(fd, HEADER_BYTES, self.header.index_bytes)
            digest = hashlib.sha256(raw)
            digest.update(self._index)
            if not hmac.compare_digest(digest.hexdigest(), entry.index_sha256):
                raise PackageError(Outcome.INDEX_WRONG)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def segments(self, lengths: list[int]) -> tuple[Segment, ...]:
        """Return where all segments lie, given the lengths of those after the first. Raises PackageError."""
        return layout.place(self.header, lengths, self.entry.size)

    def prove_whole(self) -> None:
        """Raise PackageError with CHUNK_WRONG unless every byte is the author's; needs no key."""
        digest = hashlib.sha256()
        for offset in range(0, self.entry.size, PROVE_BYTES):
            part = _stage(min(PROVE_BYTES, self.entry.size - offset))
            storage.read_into(self._fd, offset, part)
            digest.update(part)
        if not hmac.compare_digest(digest.hexdigest(), self.entry.sha256):
            raise PackageError(Outcome.CHUNK_WRONG)

    def read_segment(
        self, cipher: AESGCM, segment: Segment, out: memoryview, executor: Executor | None = None
    ) -> None:
        """Open all of `segment` into `out`, which is exactly as long. Raises PackageError."""
        assert len(out) == segment.plain_bytes, "the caller's memory is as long as the segment"
        self._open_chunks(cipher, segment, 0, segment.chunks, out, executor)

    def read_range(
        self, cipher: AESGCM, segment: Segment, start: int, out: memoryview, executor: Executor | None = None
    ) -> None:
        """Open the bytes of `segment` from `start` on into `out`, reading only the chunks that hold them.

        Whole chunks go straight into `out`; of a first and last that are cut, a copy is opened beside. Raises
        PackageError.
        """
        size = self.header.chunk_bytes
        end = start + len(out)
        assert start >= 0 and end <= segment.plain_bytes, "the range lies in the segment"
        if not len(out):
            return
        first, last = -(-start // size), end // size  # whole chunks: first to last - 1
        if end == segment.plain_bytes:
            last = segment.chunks
        try:
            if first > last:  # within one chunk
                self._open_cut(cipher, segment, last, start - last * size, out)
                return
            if start < first * size:
                self._open_cut(
                    cipher, segment, first - 1, start - (first - 1) * size, out[: first * size - start]
                )
            whole_end = min(last * size, segment.plain_bytes)
            self._open_chunks(
                cipher, segment, first, last, out[first * size - start : whole_end - start], executor
            )
            if whole_end < end:
                self._open_cut(cipher, segment, last, 0, out[whole_end - start :])
        except BaseException:
            _zero(out)
            raise

    def _open_cut(self, cipher: AESGCM, segment: Segment, chunk: int, start: int, out: memoryview) -> None:
        plain = memoryview(bytearray(self._plain_bytes(segment, chunk)))
        try:
            self._open_chunk(cipher, segment, chunk, plain)
            out[:] = plain[start : start + len(out)]
        finally:
            _zero(plain)

    def _open_chunks(
        self,
        cipher: AESGCM,
        segment: Segment,
        first: int,
        last: int,
        out: memoryview,
        executor: Executor | None,
    ) -> None:
        """Open chunks `first` to `last` - 1, side by side with an executor; on failure zero `out`."""

        def run(begin: int, end: int) -> None:
            for chunk in range(begin, end):
                at = (chunk - first) * self.header.chunk_bytes
                self._open_chunk(cipher, segment, chunk, out[at : at + self._plain_bytes(segment, chunk)])

        runs = [(begin, min(begin + RUN_CHUNKS, last)) for begin in range(first, last, RUN_CHUNKS)]
        try:
            if executor is None or len(runs) == 1:
                run(first, last)
                return
            futures: list[Future[None]] = [executor.submit(run, *each) for each in runs]
            wait(futures)  # all: nobody may still write into `out` when this returns
            for future in futures:
                future.result()
        except BaseException:
            _zero(out)
            raise

    def _open_chunk(self, cipher: AESGCM, segment: Segment, chunk: int, out: memoryview) -> None:
        offset = segment.offset + chunk * (self.header.chunk_bytes + TAG_BYTES)
        sealed = self._read_chunk(segment.first_chunk + chunk, offset, len(out) + TAG_BYTES)
        bound = layout.associated_data(self._raw_header, segment, chunk)
        try:
            cipher.decrypt_into(layout.nonce(segment.number, chunk), sealed, bound, out)
            holds = True
        except InvalidTag:
            holds = False
        if not holds:
            raise PackageError(Outcome.CHUNK_WRONG)

    def _read_chunk(self, chunk: int, offset: int, sealed_bytes: int) -> memoryview:
        """Return a chunk as it is stored, in this thread's staging memory, its digest proved."""
        if self._fd < 0:
            raise ValueError("the package is closed")
        sealed = _stage(sealed_bytes)
        storage.read_into(self._fd, offset, sealed)
        expected = self._index[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]
        if not hmac.compare_digest(hashlib.sha256(sealed).digest(), expected):
            raise PackageError(Outcome.CHUNK_WRONG)
        return sealed

    def _plain_bytes(self, segment: Segment, chunk: int) -> int:
        size = self.header.chunk_bytes
        return min(size, segment.plain_bytes - chunk * size)


def _stage(length: int) -> memoryview:
    """Return `length` bytes of this thread's staging memory: sealed bytes only, touched once and reused."""
    buffer = getattr(_staging, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = bytearray(max(length, (1 << layout.LARGE_CHUNK_LOG2) + TAG_BYTES))
        _staging.buffer = buffer
    return memoryview(buffer)[:length]


def _zero(view: memoryview) -> None:
    for start in range(0, len(view), 1 << layout.LARGE_CHUNK_LOG2):
        part = view[start : start + (1 << layout.LARGE_CHUNK_LOG2)]
        part[:] = bytes(len(part))
