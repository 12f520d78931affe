"""The folder in which a build's plain files are made: what is whole is kept, what is not is made again.

Owns: the record of finished stages, the lock that keeps a second build out.
Must not know: what a stage makes.
Invariant: a stage is in the record only when every file of it is on the disk with the digest that the record
says; a stage whose files or grounds have changed is made from nothing.

    OUT.unfinished/   stages.json   lock   model/   parts-2-int8-block/   quality/   documents/
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from infra.report import CommandError, ExitCode

RECORD: Final = "stages.json"
LOCK: Final = "lock"
SUFFIX: Final = ".unfinished"
MAX_RECORD_BYTES: Final = 16 * 1024 * 1024
PRIVATE: Final = 0o700  # plain weights lie here

Digests = dict[str, str]  # path in the stage's folder -> SHA-256, hex


class _Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage that is whole: what it was made from, and its files."""

    grounds: str
    files: Digests


class Workshop:
    """See the file's docstring. Children inherit the descriptor `lock`: while one lives, it is held."""

    def __init__(self, folder: Path, lock: int, announce: Callable[[str], None]) -> None:
        self.folder = folder
        self.lock = lock
        self._announce = announce
        self._stages = _read(folder / RECORD)

    def has(self, stage: str, grounds: str) -> bool:
        """Return whether the stage was made on these grounds and is whole."""
        known, place = self._stages.get(stage), self.folder / stage
        return (
            known is not None
            and known.grounds == grounds
            and place.is_dir()
            and _digests(place) == known.files
        )

    def made(self, stage: str, grounds: str, make: Callable[[Path], None]) -> Path:
        """Return the folder that `make` has filled: now, or before an interruption and still so.

        `grounds` names all that the stage depends on; another text has it made again.
        """
        place = self.folder / stage
        if self.has(stage, grounds):
            self._announce(f"{stage}: kept")
            return place
        self._announce(stage)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        make(place)
        self._stages[stage] = _Stage(grounds, _digests(place))
        self._write()
        return place

    def _write(self) -> None:
        unfinished = self.folder / f"{RECORD}.partial"
        with unfinished.open("wb") as file:
            file.write(msgspec.json.encode(self._stages))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.folder / RECORD)


@contextmanager
def opened(folder: Path, announce: Callable[[str], None]) -> Iterator[Workshop]:
    """Yield the workshop in `folder`, made if missing; raises CommandError where another build has it."""
    folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        if not free:
            said = "another build, or what it started, is at work on this package"
            raise CommandError(ExitCode.USAGE, "build_running", said, "wait for it, or end it")
        yield Workshop(folder, file.fileno(), announce)


def _digests(place: Path) -> Digests:
    """Return the digest of every file below `place`, each flushed to the disk."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                found[path.relative_to(place).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _read(path: Path) -> dict[str, _Stage]:
    """Return the record; an unreadable one counts as none: everything is made again."""
    try:
        raw = path.read_bytes()
        return msgspec.json.decode(raw, type=dict[str, _Stage]) if len(raw) <= MAX_RECORD_BYTES else {}
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
