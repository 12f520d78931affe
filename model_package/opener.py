"""Opening a sealed package: verified without a key, then unlocked with one. FORMAT.md 8.

Owns: the order of checks, what an opened package hands out. Must not know: where keys come from, torch.
Invariant: nothing of a package is parsed before its signature holds; a tensor's bytes exist in the caller's
memory alone; the data key is wiped when `unlock` returns, however it returns.

    open_package(path, trust) -> Package            steps 1 to 4, no key
    Package.unlock(data_key)  -> Contents           steps 5 and 6
    Contents.tensors(file)    -> SealedTensor.read_into(memory)    step 7, the chunks it needs and no others
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias, TypeVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from model_package import layout, manifest, schedule, signature, storage, toc
from model_package.layout import Kind, Segment
from model_package.manifest import Base, Manifest
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from model_package.sealed_file import SealedFile
from model_package.secret import wipe
from model_package.signature import Root, Roots

MANIFEST_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.sig"
Result = TypeVar("Result")
Memory: TypeAlias = bytearray | memoryview
CLOCK_TOLERANCE_S: Final = 3600
MAX_BLOB_READ_BYTES: Final = (
    256 * 1024 * 1024
)  # tokenizer and configuration files; the largest known is 35 MB


@dataclass(frozen=True, slots=True)
class Trust:
    """What the reader knows from outside the package."""

    owner: Owner  # whose package this must be
    roots: Roots
    now_s: int
    min_epoch: int = 0
    base: Base | None = None  # of an adapter: the opened base's `manifest.as_base`


@dataclass(frozen=True, slots=True)
class SealedTensor:
    """A tensor that costs no memory until it is read."""

    name: str = field(repr=False)
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    data_bytes: int
    _read: Callable[[int, memoryview], None] = field(repr=False)

    def read_into(self, memory: Memory) -> None:
        """Open the tensor into `memory`, writable and `data_bytes` long.

        Raises PackageError, and then `memory` holds zeros; ValueError for memory of another length.
        """
        view = memoryview(memory).cast("B")
        if len(view) != self.data_bytes:
            raise ValueError("the memory is not as long as the tensor")
        self._read(0, view)

    def read_range(self, start: int, memory: Memory) -> None:
        """Open as many bytes from `start` on as `memory` takes; only the chunks that hold them are read.

        Raises what `read_into` does.
        """
        view = memoryview(memory).cast("B")
        if not 0 <= start <= self.data_bytes - len(view):
            raise ValueError("the range leaves the tensor")
        self._read(start, view)


@dataclass(frozen=True, slots=True)
class _Opened:
    """One file whose table of contents has been opened."""

    sealed: SealedFile
    cipher: AESGCM = field(repr=False)
    table: bytes = field(repr=False)
    entries: tuple[toc.Entry, ...] = field(repr=False)  # none for a blob
    segments: tuple[Segment, ...] = field(repr=False)


class Contents:
    """An unlocked package: files by name, tensors by file. `close` drops every key."""

    def __init__(self, opened: dict[str, _Opened], threads: int) -> None:
        self._opened = opened
        self._executor = ThreadPoolExecutor(threads, "unseal") if threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the ciphers with their keys; tensors handed out cannot be read any more."""
        self._opened.clear()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def names(self, kind: Kind | None = None) -> tuple[str, ...]:
        """Return the names of all files, or of those of one kind, sorted."""
        return tuple(
            name for name, opened in self._opened.items() if kind is None or opened.sealed.header.kind is kind
        )

    def file(self, name: str) -> bytes | None:
        """Return a blob's content, or None when the package has no such blob.

        Raises PackageError, and ValueError above MAX_BLOB_READ_BYTES.
        """
        if name not in self.names(Kind.BLOB):
            return None
        blob = self.blob(name)
        if blob.data_bytes > MAX_BLOB_READ_BYTES:
            raise ValueError(f"a file of the package exceeds {MAX_BLOB_READ_BYTES} bytes")
        content = bytearray(blob.data_bytes)
        blob.read_into(content)
        return bytes(content)

    def blob(self, name: str) -> SealedTensor:
        """Return a blob as one nameless tensor of bytes, to be read in parts. Raises KeyError."""
        if name not in self.names(Kind.BLOB):
            raise KeyError("the package has no such blob")
        segment = self._opened[name].segments[1]
        return SealedTensor(
            "", "U8", (segment.plain_bytes,), segment.plain_bytes, self._reader(name, segment)
        )

    def header(self, name: str) -> bytes:
        """Return the safetensors header of the tensors file `name`, as it was sealed. Raises KeyError."""
        return self._tensors_file(name).table

    def tensors(self, name: str) -> Iterator[SealedTensor]:
        """Yield the tensors of the file `name` in the order of their data. Raises KeyError."""
        opened = self._tensors_file(name)
        for entry, segment in zip(opened.entries, opened.segments[1:], strict=True):
            yield SealedTensor(
                entry.name, entry.dtype, entry.shape, entry.data_bytes, self._reader(name, segment)
            )

    def _tensors_file(self, name: str) -> _Opened:
        opened = self._opened.get(name)
        if opened is None or opened.sealed.header.kind is not Kind.TENSORS:
            raise KeyError("the package has no such tensors file")
        return opened

    def _reader(self, name: str, segment: Segment) -> Callable[[int, memoryview], None]:
        def read(start: int, out: memoryview) -> None:
            if name not in self._opened:  # looked up: a tensor must not keep a cipher alive
                raise ValueError("the package is closed")
            without_frames(lambda: self._open_part(self._opened[name], segment, start, out))

        return read

    def _open_part(self, opened: _Opened, segment: Segment, start: int, out: memoryview) -> None:
        if len(out) == segment.plain_bytes:
            opened.sealed.read_segment(opened.cipher, segment, out, self._executor)
        else:
            opened.sealed.read_range(opened.cipher, segment, start, out, self._executor)


class Package:
    """A package whose signature, manifest, headers and indexes hold; its files stay open until `close`."""

    def __init__(self, verified: Manifest, signer: Root, files: tuple[SealedFile, ...]) -> None:
        self.manifest = verified
        self.signer = signer
        self._files = files

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def prove_whole(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Prove every byte of every sealed file, without a key. Raises PackageError."""
        done = 0
        for file in self._files:
            file.prove_whole()
            done += file.entry.size
            progress(done)

    def unlock(self, data_key: bytearray, threads: int = 1) -> Contents:
        """Return the contents, opened by `threads` threads when read. Takes over `data_key` and wipes it.

        Raises PackageError with KEY_WRONG, CHUNK_WRONG, TOC_MALFORMED, GEOMETRY_WRONG or UNREADABLE.
        """
        try:
            return Contents(without_frames(lambda: self._open_all(data_key)), threads)
        finally:
            wipe(data_key)

    def _open_all(self, data_key: bytearray) -> dict[str, _Opened]:
        package_id = bytes.fromhex(self.manifest.package_id)
        schedule.check_commitment(data_key, package_id, bytes.fromhex(self.manifest.commitment))
        return {file.entry.name: _open_file(file, data_key, package_id) for file in self._files}


def without_frames(call: Callable[[], Result]) -> Result:
    """Return what `call` returns; a PackageError of it is raised anew, from here.

    An exception keeps the frames alive through which it passed, and those hold ciphers with their keys.
    """
    try:
        return call()
    except PackageError as error:
        outcome = error.outcome
    raise PackageError(outcome)


def open_package(path: Path, trust: Trust) -> Package:
    """Return the package at `path`, verified as far as no key is needed: FORMAT.md 8, steps 1 to 4.

    Raises PackageError.
    """
    directory = storage.open_directory(path)
    try:
        raw = storage.read_whole(
            directory, MANIFEST_NAME, Outcome.MANIFEST_MISSING, manifest.MAX_MANIFEST_BYTES
        )
        if not manifest.MIN_MANIFEST_BYTES <= len(raw) <= manifest.MAX_MANIFEST_BYTES:
            raise PackageError(Outcome.MANIFEST_OVERSIZED)
        signed = storage.read_whole(
            directory, SIGNATURE_NAME, Outcome.SIGNATURE_MISSING, signature.SIGNATURE_FILE_BYTES
        )
        signer = signature.check(signed, raw, trust.roots, trust.owner, trust.now_s)
        verified = manifest.parse(raw)
        compare(verified, trust)
        return Package(verified, signer, _open_files(directory, verified))
    finally:
        os.close(directory)


def compare(verified: Manifest, trust: Trust) -> None:
    """Hold a manifest against what the reader knows from outside: FORMAT.md 4.3. Raises PackageError."""
    checks = (
        (verified.format == manifest.FORMAT, Outcome.FORMAT_UNSUPPORTED),
        (verified.min_loader <= manifest.LOADER_REVISION, Outcome.LOADER_TOO_OLD),
        (verified.owner is trust.owner, Outcome.OWNER_WRONG),
        (verified.epoch >= trust.min_epoch, Outcome.EPOCH_TOO_OLD),
        (verified.created_s <= trust.now_s + CLOCK_TOLERANCE_S, Outcome.CLOCK_BEHIND),
        (verified.base == trust.base, Outcome.BASE_WRONG),
    )
    for holds, outcome in checks:
        if not holds:
            raise PackageError(outcome)


def _open_files(directory: int, verified: Manifest) -> tuple[SealedFile, ...]:
    package_id = bytes.fromhex(verified.package_id)
    with contextlib.ExitStack() as undo:
        files = []
        for entry in verified.files:
            fd = storage.open_regular(directory, entry.stored_name, Outcome.FILE_MISSING)
            file = SealedFile(fd, entry, package_id)
            undo.callback(file.close)
            files.append(file)
        undo.pop_all()
    return tuple(files)


def _open_file(file: SealedFile, data_key: bytearray, package_id: bytes) -> _Opened:
    header = file.header
    cipher = schedule.file_cipher(data_key, package_id, header.file_id)
    table = bytearray(header.toc_bytes)
    file.read_segment(cipher, layout.toc_segment(header), memoryview(table))
    if header.kind is Kind.BLOB:
        segments = file.segments([layout.blob_bytes(header, file.entry.size)])
        return _Opened(file, cipher, b"", (), segments)
    entries = toc.parse(bytes(table), header.segments - 1)
    segments = file.segments([entry.data_bytes for entry in entries])
    return _Opened(file, cipher, bytes(table), entries, segments)
