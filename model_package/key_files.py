"""Keys in files and descriptors: read without a copy, written once.

Owns: what a key file may look like, its modes, hex. Must not know: what a key is for, sources, licences.
Invariant: what was read is in the bytearray returned and nowhere else, whether reading succeeds or fails; a
file that exists is never overwritten.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from model_package.refusal import KeyRefused, Refusal
from model_package.secret import KEY_BYTES, wipe

HEX_CHARS: Final = 2 * KEY_BYTES
READ_BYTES: Final = HEX_CHARS + 2  # 64 digits, a line end, and one more to see that there is more
OTHERS: Final = 0o077  # what the mode of a key file must not grant

_DIGITS: Final = b"0123456789abcdef"
_VALUES: Final = {digit: value for value, digit in enumerate(_DIGITS)}
_LINE_END: Final = 0x0A


def read_file(path: Path, *, unlink: bool = False, private: bool = True) -> bytearray:
    """Return the 32-byte key in the file at `path`; the caller wipes it.

    Links are followed: Kubernetes mounts secrets as links, and it is the file behind them whose mode counts.
    `private` False accepts any mode, for what a platform lays out read-only. `unlink` removes the file then.
    Raises KeyRefused.
    """
    refusal = None
    descriptor = -1
    try:  # O_NONBLOCK: a pipe in the file's place must not hold the start
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        refusal = Refusal.KEY_MISSING
    except OSError:
        refusal = Refusal.KEY_UNREADABLE
    if refusal is not None:
        raise KeyRefused(refusal)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise KeyRefused(Refusal.KEY_NOT_REGULAR)
        if private and mode & OTHERS:
            raise KeyRefused(Refusal.KEY_EXPOSED)
        key = _read(descriptor)
    finally:
        os.close(descriptor)
    if unlink and not _unlinked(path):
        wipe(key)
        raise KeyRefused(Refusal.KEY_NOT_UNLINKED)
    return key


def read_descriptor(descriptor: int) -> bytearray:
    """Return the 32-byte key that can be read from `descriptor` and close it; the caller wipes the key.

    Modes are not looked at: whoever opened it decided. Raises KeyRefused.
    """
    opened = True
    try:
        os.fstat(descriptor)
    except OSError:
        opened = False
    if not opened:
        raise KeyRefused(Refusal.KEY_MISSING)
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def decode(text: bytearray) -> bytearray:
    """Return the key in `text`: 32 raw bytes, or 64 digits of lower-case hex and at most one line end.

    `text` stays the caller's to wipe. Raises KeyRefused.
    """
    if len(text) == KEY_BYTES:
        return bytearray(text)
    digits = len(text) - 1 if text and text[-1] == _LINE_END else len(text)
    key = bytearray(KEY_BYTES)
    if digits != HEX_CHARS or any(text[place] not in _VALUES for place in range(digits)):
        raise KeyRefused(Refusal.KEY_LENGTH_WRONG)
    for place in range(KEY_BYTES):
        key[place] = _VALUES[text[2 * place]] << 4 | _VALUES[text[2 * place + 1]]
    return key


def write_new(path: Path, key: bytearray) -> None:
    """Write `key` as hex and a line end to a new file of mode 0600, and onto the disk. Raises KeyRefused."""
    text = bytearray(HEX_CHARS + 1)
    for place, byte in enumerate(key):
        text[2 * place], text[2 * place + 1] = _DIGITS[byte >> 4], _DIGITS[byte & 15]
    text[-1] = _LINE_END
    try:
        write_new_text(path, text, 0o600)
    finally:
        wipe(text)


def write_new_text(path: Path, text: bytes | bytearray, mode: int) -> None:
    """Write `text` to a new file at `path`, and onto the disk; nothing is left when that fails.

    Raises KeyRefused with KEY_FILE_EXISTS or KEY_NOT_WRITTEN.
    """
    refusal = None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except FileExistsError:
        refusal = Refusal.KEY_FILE_EXISTS
    except OSError:
        refusal = Refusal.KEY_NOT_WRITTEN
    if refusal is not None:
        raise KeyRefused(refusal)
    try:
        written = os.write(descriptor, text) == len(text)
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    except OSError:
        written = False
    finally:
        os.close(descriptor)
    if not written:
        with contextlib.suppress(OSError):
            path.unlink()
        raise KeyRefused(Refusal.KEY_NOT_WRITTEN)


def _read(descriptor: int) -> bytearray:
    text = bytearray(READ_BYTES)
    have = 0
    failed = False
    try:
        with memoryview(text) as view:
            while have < READ_BYTES:
                count = os.readv(descriptor, [view[have:]])
                if not count:
                    break
                have += count
    except OSError:
        failed = True
    part = text[:have]
    wipe(text)
    try:
        if failed:
            raise KeyRefused(Refusal.KEY_UNREADABLE)
        return decode(part)
    finally:
        wipe(part)


def _unlinked(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
