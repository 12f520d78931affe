"""A package's plain files written back to a directory, for its owner alone. FORMAT.md 5.6.

Owns: the only code that writes plain bytes. Must not know: who asks.
Invariant: files are made anew, readable by their owner alone, and complete or absent; nothing that serves
imports this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from model_package import storage
from model_package.layout import Kind
from model_package.opener import Contents, SealedTensor
from model_package.sealing import SAFETENSORS_LENGTH_BYTES, SealError

PART_BYTES: Final = 8 << 20  # held at once


def unseal(contents: Contents, destination: Path, progress: Callable[[int], None] = lambda _: None) -> int:
    """Write every file of `contents` below the new directory `destination`; return the bytes written.

    `progress` gets bytes written since the last call. Raises PackageError, SealError, OSError.
    """
    destination.mkdir(parents=True, exist_ok=True, mode=0o700)
    if any(destination.iterdir()):
        raise SealError("the destination is not empty")
    written = 0
    for name in contents.names():
        path = destination / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = storage.open_directory(path.parent)
        try:
            with storage.completed(directory, path.name, storage.PRIVATE) as fd:
                written += _write(contents, name, fd, progress)
        finally:
            os.close(directory)
    return written


def _write(contents: Contents, name: str, fd: int, progress: Callable[[int], None]) -> int:
    if name in contents.names(Kind.TENSORS):
        header = contents.header(name)
        head = len(header).to_bytes(SAFETENSORS_LENGTH_BYTES, "little") + header
        parts = list(contents.tensors(name))
    else:
        head, parts = b"", [contents.blob(name)]
    storage.write_at(fd, 0, head)
    offset = len(head)
    for part in parts:
        offset += _write_part(part, fd, offset, progress)
    return offset


def _write_part(part: SealedTensor, fd: int, offset: int, progress: Callable[[int], None]) -> int:
    memory = memoryview(bytearray(min(PART_BYTES, part.data_bytes)))
    for start in range(0, part.data_bytes, PART_BYTES):
        piece = memory[: min(PART_BYTES, part.data_bytes - start)]
        part.read_range(start, piece)
        storage.write_at(fd, offset + start, piece)
        progress(len(piece))
    return part.data_bytes
