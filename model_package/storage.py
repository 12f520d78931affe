"""The package's directory: files opened safely, and files written so that a crash leaves none half done.

Owns: opening without following links, bounded reads, temporary name + flush + rename. FORMAT.md 2.
Must not know: what the bytes mean.
Invariant: only names given by the caller are opened, relative to one directory descriptor; a name that exists
without its temporary suffix is complete on the disk.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from model_package.outcome import Outcome, PackageError

PARTIAL_SUFFIX: Final = ".partial"
PUBLIC: Final = 0o644  # a package is ciphertext, and the user that serves it is not the one that copied it
PUBLIC_DIRECTORY: Final = 0o755
PRIVATE: Final = 0o600  # what is plain
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block the open


def open_directory(path: Path) -> int:
    """Return a descriptor of the directory `path`. Raises PackageError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        outcome = Outcome.MANIFEST_MISSING
    except OSError:
        outcome = Outcome.UNREADABLE
    raise PackageError(outcome)


def open_regular(directory: int, name: str, missing: Outcome) -> int:
    """Return a descriptor of the regular file `name`. Raises PackageError, `missing` where there is none."""
    fd: int | None = None
    try:
        fd = os.open(name, _READ, dir_fd=directory)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        outcome = Outcome.NOT_A_REGULAR_FILE
    except FileNotFoundError:
        regular, outcome = False, missing
    except OSError:
        regular, outcome = False, _why_not(directory, name)
    if fd is not None and regular:
        return fd
    if fd is not None:
        os.close(fd)
    raise PackageError(outcome)


def read_whole(directory: int, name: str, missing: Outcome, most_bytes: int) -> bytes:
    """Return a small file's content, cut after `most_bytes` + 1: so the caller sees that it is too long."""
    fd = open_regular(directory, name, missing)
    try:
        return read_at(fd, 0, min(size_of(fd), most_bytes + 1))
    finally:
        os.close(fd)


def size_of(fd: int) -> int:
    return os.fstat(fd).st_size


def read_at(fd: int, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset`. Raises PackageError with SIZE_WRONG where the file ends before."""
    buffer = bytearray(length)
    read_into(fd, offset, memoryview(buffer))
    return bytes(buffer)


def read_into(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset`. Raises PackageError: SIZE_WRONG at the end, UNREADABLE on failure."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError:
            count = -1  # raised below, outside the handler
        if count <= 0:
            raise PackageError(Outcome.SIZE_WRONG if count == 0 else Outcome.UNREADABLE)
        done += count


def write_at(fd: int, offset: int, content: memoryview | bytearray | bytes) -> None:
    """Write all of `content` at `offset`. Raises OSError."""
    view = memoryview(content)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def make_directory(path: Path) -> None:
    """Make the directory of a package unless it is there, open to every reader. Raises OSError."""
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(PUBLIC_DIRECTORY)


@contextlib.contextmanager
def completed(directory: int, name: str, mode: int = PUBLIC) -> Iterator[int]:
    """Give a descriptor to write `name` through; the name appears, flushed, only if the block ends well.

    Whatever the umask, the file gets `mode` with its name, and until then is its owner's alone.
    """
    partial = name + PARTIAL_SUFFIX
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(partial, flags, 0o600, dir_fd=directory)
    try:
        try:
            yield fd
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=directory)
        raise
    os.fsync(directory)


def write_whole(directory: int, name: str, content: bytes) -> None:
    """Write a small file. Raises OSError."""
    with completed(directory, name) as fd:
        write_at(fd, 0, content)


def _why_not(directory: int, name: str) -> Outcome:
    """Tell a link or a socket in the file's place from a failing system."""
    try:
        regular = stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return Outcome.UNREADABLE
    return Outcome.UNREADABLE if regular else Outcome.NOT_A_REGULAR_FILE
