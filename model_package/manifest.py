"""The manifest: what a package holds, whose it is, what it is bound to. FORMAT.md 4.

Owns: fields and bounds, the canonical encoding, the rules for file names, the content digest.
Must not know: signatures, keys, where the bytes come from.
Invariant: a Manifest made by `parse` is within every bound, and `encode` gives back its very bytes.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Final

import msgspec

from model_package.layout import HEADER_BYTES, MAX_FILE_BYTES, Kind
from model_package.outcome import Outcome, PackageError
from model_package.recipients import MAX_RECIPIENTS, Hex32, KeyContext, Owner, Recipient, check

FORMAT: Final = 1
LOADER_REVISION: Final = 1
MIN_MANIFEST_BYTES: Final = 2
MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
MAX_FILES: Final = 4096
MAX_INTEGER: Final = 2**50
MAX_REVISION: Final = 2**31 - 1
CONTENT_LABEL: Final = b"strongroom/package/v1/content\0"

Hex64 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Plain = Annotated[str, msgspec.Meta(pattern=r"\A[ !#-\[\]-~]*\Z")]  # printable ASCII that JSON never escapes
ModelWord = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,100}\Z")]
Revision = Annotated[int, msgspec.Meta(ge=0, le=MAX_REVISION)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]

_NAME: Final = re.compile(
    r"(?=.{1,200}\Z)[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){0,3}"
)
_DOT_AT_END: Final = re.compile(r"\.(/|\Z)")


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The package an adapter was made from."""

    content_sha256: Hex64
    package_id: Hex32


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the owner calls it."""

    name: ModelWord
    version: ModelWord


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sealed file."""

    file_id: Hex32
    index_sha256: Hex64
    kind: Kind
    name: Plain
    sha256: Hex64
    size: Annotated[int, msgspec.Meta(ge=HEADER_BYTES, le=MAX_FILE_BYTES)]

    @property
    def stored_name(self) -> str:
        """What the file is called on the disk; never made from `name`."""
        return f"{self.file_id}.sealed"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FORMAT.md 4.2."""

    base: Base | None
    commitment: Hex64
    created_s: Seconds
    epoch: Revision
    files: Annotated[tuple[FileEntry, ...], msgspec.Meta(min_length=1, max_length=MAX_FILES)]
    format: Seconds
    min_loader: Revision
    model: Model
    owner: Owner
    package_id: Hex32
    recipients: Annotated[tuple[Recipient, ...], msgspec.Meta(max_length=MAX_RECIPIENTS)]

    @property
    def content_sha256(self) -> str:
        """Digest of what is sealed, whoever may unwrap it: hex. FORMAT.md 4.4."""
        content = {
            "commitment": self.commitment,
            "files": self.files,
            "owner": self.owner,
            "package_id": self.package_id,
        }
        return hashlib.sha256(CONTENT_LABEL + msgspec.json.encode(content, order="sorted")).hexdigest()

    @property
    def as_base(self) -> Base:
        """What an adapter made from this package names as its base."""
        return Base(self.content_sha256, self.package_id)

    @property
    def key_context(self) -> KeyContext:
        """What this package's wrapped keys are bound to."""
        return KeyContext(bytes.fromhex(self.package_id), bytes.fromhex(self.content_sha256), self.owner)


_DECODER: Final = msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """Return the canonical bytes. Raises PackageError for a manifest that `parse` would refuse."""
    raw = msgspec.json.encode(manifest, order="sorted")
    parse(raw)
    return raw


def parse(raw: bytes) -> Manifest:
    """Return the manifest in `raw`, whose signature the caller has checked.

    Raises PackageError with MANIFEST_OVERSIZED, MANIFEST_MALFORMED or NAME_REFUSED.
    """
    if not MIN_MANIFEST_BYTES <= len(raw) <= MAX_MANIFEST_BYTES:
        raise PackageError(Outcome.MANIFEST_OVERSIZED)
    manifest: Manifest | None
    try:
        manifest = _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        manifest = None  # raised below: the exception would hold content
    if manifest is None or msgspec.json.encode(manifest, order="sorted") != raw:
        raise PackageError(Outcome.MANIFEST_MALFORMED)
    ids = {entry.file_id for entry in manifest.files}
    names = [entry.name for entry in manifest.files]
    if len(ids) != len(names) or names != sorted(names):
        raise PackageError(Outcome.MANIFEST_MALFORMED)
    check(manifest.recipients)
    check_names(names)
    return manifest


def check_names(names: list[str]) -> None:
    """Raise PackageError with NAME_REFUSED unless every name is plain and none clashes with another."""
    folders: set[str] = set()
    lowered = {name.lower() for name in names}
    for name in lowered:
        parts = name.split("/")
        folders.update("/".join(parts[:end]) for end in range(1, len(parts)))
    plain = all(_NAME.fullmatch(name) and not _DOT_AT_END.search(name) for name in names)
    if not plain or len(lowered) != len(names) or folders & lowered:
        raise PackageError(Outcome.NAME_REFUSED)
