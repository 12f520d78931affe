"""A release as a folder: which files it holds and what `release.json` says of them.

Owns: names, the form of release.json, reading and writing of it. Must not know: how it is signed.
Invariant: the document names every file but itself, its signature and the public key, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ARCHIVE: Final = "image.tar"
CYCLONEDX: Final = "sbom.cdx.json"
SPDX: Final = "sbom.spdx.json"
PROVENANCE: Final = "provenance.dsse.json"
ADVISORIES: Final = "advisories.json"
RELEASE: Final = "release.json"
SIGNATURE: Final = "release.sig"
PUBLIC_KEY: Final = "release.pub"
LISTED: Final = (ARCHIVE, CYCLONEDX, SPDX, PROVENANCE, ADVISORIES)
KIND: Final = "strongroom release 1"
MAX_DOCUMENT_BYTES: Final = 64 * 1024


class ReleaseRefused(Exception):
    """The folder is not a sound release; `hint` is the next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Release:
    """What release.json says. `files` is name -> SHA-256; `model_manifest_sha256` is None without a model."""

    name: str
    version: str
    variant: str
    tag: str
    revision: str
    created_s: int
    image_id: str
    manifest_digest: str
    files: Mapping[str, str]
    model_manifest_sha256: str | None = None

    def encode(self) -> bytes:
        """Return the document's bytes."""
        document = {"kind": KIND, **asdict(self), "files": dict(self.files)}
        return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


def decode(document: bytes) -> Release:
    """Return what the bytes of a release.json say; raises ReleaseRefused."""
    try:
        fields: dict[str, Any] = json.loads(document)
        if fields.pop("kind") != KIND:
            raise ValueError
        release = Release(**fields)
        if sorted(release.files) != sorted(LISTED):
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise ReleaseRefused(
            f"`{RELEASE}` is not of the form `{KIND}`", "is it of another version?"
        ) from error
    return release


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
