"""Sealing a package: a directory of plain files in, a sealed directory out, resumable. FORMAT.md 2.

Owns: which files go in, the order of writing, what an interrupted sealing leaves and how it goes on.
Must not know: where keys come from, how models are converted.
Invariant: `manifest.json` is renamed into place last, so what is interrupted anywhere does not open; a file
sealed again gets a new id, so no nonce repeats; the record of progress holds no key and no plain byte.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from model_package import beside, layout, manifest, recipients, schedule, sealing, signature, storage
from model_package.beside import Documents
from model_package.manifest import Base, FileEntry, Manifest, Model
from model_package.opener import MANIFEST_NAME, SIGNATURE_NAME
from model_package.outcome import Outcome, PackageError
from model_package.recipients import DATA_KEY_BYTES, KeyContext, Owner, Recipient
from model_package.sealing import SealError, Source

PROGRESS_NAME: Final = "sealing.json"
MAX_PROGRESS_BYTES: Final = 2 * manifest.MAX_MANIFEST_BYTES
_OWN_FILE: Final = re.compile(
    r"[0-9a-f]{32}\.sealed(\.partial)?|(manifest\.json|sealing\.json)\.partial|manifest\.sig(\.partial)?|("
    + "|".join(map(re.escape, beside.NAMES))
    + r")(\.partial)?"
)
_BEGUN_PARTIAL: Final = (
    PROGRESS_NAME + storage.PARTIAL_SUFFIX
)  # all that a call killed at its beginning leaves

Wrap = Callable[[KeyContext, bytearray], Iterable[Recipient]]


def to_public_keys(keys: Iterable[bytes]) -> Wrap:
    """Return how to wrap a data key for the holders of X25519 public keys."""
    known = tuple(keys)
    return lambda context, data_key: [recipients.wrap(data_key, key, context) for key in known]


@dataclass(frozen=True, slots=True)
class Sealing:
    """What a sealing is told beside the files and the keys."""

    owner: Owner
    model: Model
    created_s: int
    epoch: int = 0
    base: Base | None = None  # of an adapter
    log2_chunk: int = layout.LARGE_CHUNK_LOG2
    threads: int = 1
    # Fresh random bytes, as many as asked for. Anything else is for tests: ids that repeat repeat nonces.
    draw: Callable[[int], bytes] = os.urandom
    documents: Documents = field(default_factory=Documents)


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that is done, and what its source was then."""

    entry: FileEntry
    log2_chunk: int
    stamp: tuple[int, int, int]


class _Progress(msgspec.Struct, forbid_unknown_fields=True):
    """What `sealing.json` holds."""

    commitment: str
    package_id: str
    sealed: dict[str, _Sealed]


def files_of(directory: Path) -> dict[str, Path]:
    """Return name in the package -> path of every file below `directory`.

    Names that begin with a dot are left out (`.gitattributes` and the like). Raises SealError.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if any(part.startswith(".") for part in parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise SealError("a link leads to a folder\nhint: put a copy of the folder in its place")
        if not path.is_dir():
            found["/".join(parts)] = path
    return found


def seal(
    files: Mapping[str, Path],
    destination: Path,
    told: Sealing,
    data_key: bytearray,
    wrap: Wrap,
    signer: bytearray,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Manifest:
    """Seal `files` into the directory `destination`, or go on where an interrupted call left it.

    `data_key` and `signer`, an Ed25519 private key, stay the caller's, to wipe. `progress` gets plain bytes
    done and in all. Raises SealError and OSError; what is done is kept for the next call with the same key.
    """
    if len(data_key) != DATA_KEY_BYTES:
        raise SealError(f"a data key has {DATA_KEY_BYTES} bytes")
    _check_names(list(files))
    sources = [sealing.read_source(name, files[name]) for name in sorted(files)]
    storage.make_directory(destination)
    directory = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        state = _begin(directory, data_key, told)
        entries = _seal_all(directory, sources, state, data_key, told, progress)
        _remove_all_but(directory, {entry.stored_name for entry in entries})
        made = _manifest(entries, state, told, data_key, wrap)
        publish(directory, made, signer, told.documents)
        os.unlink(PROGRESS_NAME, dir_fd=directory)
    finally:
        os.close(directory)
    return made


def publish(directory: int, made: Manifest, signer: bytearray, documents: Documents | None = None) -> None:
    """Write documents, signature, then manifest. Raises PackageError for a manifest that cannot be read."""
    raw = manifest.encode(made)
    signed = {SIGNATURE_NAME: signature.sign(raw, signer), MANIFEST_NAME: raw}
    files = {} if documents is None else documents.files(made, signed, signer)
    for name, content in (files | signed).items():
        storage.write_whole(directory, name, content)


def _check_names(names: list[str]) -> None:
    if not 1 <= len(names) <= manifest.MAX_FILES:
        raise SealError(f"a package holds 1 to {manifest.MAX_FILES} files")
    try:
        manifest.check_names(names)
        plain = True
    except PackageError:
        plain = False
    if not plain:
        raise SealError("a file has a name that a package cannot hold\nhint: see FORMAT.md 4.2")


def _begin(directory: int, data_key: bytearray, told: Sealing) -> _Progress:
    """Return what an interrupted sealing left here, or a new beginning. Raises SealError."""
    present = set(os.listdir(directory)) - {_BEGUN_PARTIAL}
    if MANIFEST_NAME in present:
        raise SealError("the destination holds a package already")
    if PROGRESS_NAME not in present:
        if present:
            raise SealError("the destination is not empty")
        package_id = told.draw(layout.ID_BYTES)
        state = _Progress(schedule.commitment(data_key, package_id).hex(), package_id.hex(), {})
        _save(directory, state)
        return state
    found = _load(directory)
    if found is None:
        raise SealError(f"`{PROGRESS_NAME}` is damaged\nhint: empty the destination and begin again")
    expected = schedule.commitment(data_key, bytes.fromhex(found.package_id)).hex()
    if not hmac.compare_digest(expected, found.commitment):
        raise SealError("the destination holds a sealing begun with another data key\nhint: empty it")
    return found


def _seal_all(
    directory: int,
    sources: list[Source],
    state: _Progress,
    data_key: bytearray,
    told: Sealing,
    progress: Callable[[int, int], None],
) -> list[FileEntry]:
    total = sum(source.plain_bytes for source in sources)
    done = 0
    entries = []

    def advance(plain_bytes: int) -> None:
        nonlocal done
        done += plain_bytes
        progress(done, total)

    for source in sources:
        before = state.sealed.get(source.name)
        if before is not None and _still_good(directory, source, before, told.log2_chunk):
            advance(source.plain_bytes)
        else:
            package_id, file_id = bytes.fromhex(state.package_id), told.draw(layout.ID_BYTES)
            entry = sealing.seal_file(
                directory, source, data_key, package_id, file_id, told.log2_chunk, told.threads, advance
            )
            before = _Sealed(entry, told.log2_chunk, source.stamp)
            state.sealed[source.name] = before
            _save(directory, state)
        entries.append(before.entry)
    return entries


def _still_good(directory: int, source: Source, before: _Sealed, log2_chunk: int) -> bool:
    """True when the source has not changed and its sealed file lies here, every byte as it was."""
    if (before.stamp, before.log2_chunk) != (source.stamp, log2_chunk):
        return False
    try:
        fd = storage.open_regular(directory, before.entry.stored_name, Outcome.FILE_MISSING)
    except PackageError:
        return False
    try:
        size = storage.size_of(fd)
        return size == before.entry.size and sealing.file_sha256(fd, size) == before.entry.sha256
    except PackageError:
        return False
    finally:
        os.close(fd)


def _manifest(
    entries: list[FileEntry], state: _Progress, told: Sealing, data_key: bytearray, wrap: Wrap
) -> Manifest:
    bare = Manifest(
        base=told.base,
        commitment=state.commitment,
        created_s=told.created_s,
        epoch=told.epoch,
        files=tuple(sorted(entries, key=lambda entry: entry.name)),
        format=manifest.FORMAT,
        min_loader=manifest.LOADER_REVISION,
        model=told.model,
        owner=told.owner,
        package_id=state.package_id,
        recipients=(),
    )
    wrapped = recipients.arranged(wrap(bare.key_context, data_key))
    return msgspec.structs.replace(bare, recipients=wrapped)


def _remove_all_but(directory: int, kept: set[str]) -> None:
    """Remove what interrupted calls left of their own making, and nothing else."""
    for name in os.listdir(directory):
        if name not in kept and _OWN_FILE.fullmatch(name):
            os.unlink(name, dir_fd=directory)


def _save(directory: int, state: _Progress) -> None:
    storage.write_whole(directory, PROGRESS_NAME, msgspec.json.encode(state))


def _load(directory: int) -> _Progress | None:
    try:
        raw = storage.read_whole(directory, PROGRESS_NAME, Outcome.FILE_MISSING, MAX_PROGRESS_BYTES)
    except PackageError:
        return None
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(raw, type=_Progress)
    return None
