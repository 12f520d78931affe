"""What lies in the clear beside the sealed files: for people, and for tools that hold no key. FORMAT.md 2.1.

Owns: the closed list of names, making and proving these files. Must not know: where keys come from.
Invariant: no loader reads any of them, and what a package is does not depend on them; what is shown of them
was signed by the package's owner for this very content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from model_package import bom, oms, signature, storage
from model_package.manifest import Manifest
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from model_package.signature import Roots
from model_package.worded import WordedError

TEXTS: Final = ("LICENSE", "README.md", "quality.json", "quality.md", "quality.svg")
BOM_NAME: Final = "bom.cdx.json"
BOM_SIGNATURE_NAME: Final = "bom.cdx.sig"
NAMES: Final = (*TEXTS, BOM_NAME, BOM_SIGNATURE_NAME, oms.NAME)
BOM_PURPOSE: Final = b"strongroom/package/v1/bom"
MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024


class DocumentsRefused(WordedError):
    """What lies beside the package is not what its owner signed for it."""

    message = "the bill of materials, or a document that it names, is not what the owner signed"
    hint = "fetch the package again; what is sealed does not depend on it"


@dataclass(frozen=True, slots=True)
class Documents:
    """What an owner lays beside a package. `oms_key`, a P-256 private key, stays the caller's to wipe."""

    texts: Mapping[str, bytes] = field(default_factory=dict)
    described: bom.Described | None = None
    bill: bytes | None = None  # one that was made before, for the same content
    oms_key: bytearray | None = field(default=None, repr=False)

    def files(self, made: Manifest, signed: Mapping[str, bytes], signer: bytearray) -> dict[str, bytes]:
        """Return name -> content of all that is written before `signed`, manifest and signature."""
        assert self.texts.keys() <= {*TEXTS}, "a closed list"
        found = dict(self.texts)
        bill = self.bill if self.described is None else bom.make(made, self.described, self.texts)
        if bill is not None:
            found[BOM_NAME] = bill
            found[BOM_SIGNATURE_NAME] = signature.sign(bill, signer, BOM_PURPOSE)
        if self.oms_key is not None:
            whole = {**found, **signed}
            digests = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}
            digests |= {entry.stored_name: entry.sha256 for entry in made.files}
            found[oms.NAME] = oms.sign(self.oms_key, made.model.name, digests)
        return found


def read(package: Path) -> dict[str, bytes]:
    """Return the documents that lie in the directory `package`, unproved. Raises PackageError."""
    directory = storage.open_directory(package)
    try:
        present = {path.name for path in package.iterdir()}
        return {
            name: storage.read_whole(directory, name, Outcome.FILE_MISSING, MAX_DOCUMENT_BYTES)
            for name in NAMES
            if name in present
        }
    finally:
        os.close(directory)


def prove(package: Path, manifest: Manifest, roots: Roots, now_s: int) -> dict[str, Any] | None:
    """Return the bill of materials beside the package of `manifest`, None where there is none.

    Its signature holds, it is of this content, and the documents it names are as it says. Raises
    DocumentsRefused, PackageError.
    """
    found = read(package)
    raw = found.get(BOM_NAME)
    if raw is None:
        return None
    if not _signed(raw, found.get(BOM_SIGNATURE_NAME, b""), roots, manifest.owner, now_s):
        raise DocumentsRefused
    bill: dict[str, Any] = json.loads(raw)
    named = bom.clear_files(bill)
    present = {name: hashlib.sha256(found[name]).hexdigest() for name in TEXTS if name in found}
    if bom.content_of(bill) != manifest.content_sha256 or named != present:
        raise DocumentsRefused
    return bill


def _signed(raw: bytes, signed: bytes, roots: Roots, owner: Owner, now_s: int) -> bool:
    try:
        signature.check(signed, raw, roots, owner, now_s, BOM_PURPOSE)
    except PackageError:
        return False
    return True
