"""What became of an attempt to open a package: one closed list, no text from anywhere else. FORMAT.md 9.

Owns: the outcomes, their messages and hints. Must not know: how anything is checked.
Invariant: a PackageError names one outcome and holds no content, name, key or digest.
"""

from __future__ import annotations

import enum
from typing import Final


class Outcome(enum.StrEnum):
    """FORMAT.md 9, in its order."""

    OPENED = "opened"
    MANIFEST_MISSING = "manifest-missing"
    SIGNATURE_MISSING = "signature-missing"
    NOT_A_REGULAR_FILE = "not-a-regular-file"
    MANIFEST_OVERSIZED = "manifest-oversized"
    SIGNATURE_MALFORMED = "signature-malformed"
    SIGNER_UNKNOWN = "signer-unknown"
    SIGNER_OF_OTHER_PARTY = "signer-of-other-party"
    SIGNER_EXPIRED = "signer-expired"
    SIGNATURE_WRONG = "signature-wrong"
    MANIFEST_MALFORMED = "manifest-malformed"
    NAME_REFUSED = "name-refused"
    FORMAT_UNSUPPORTED = "format-unsupported"
    LOADER_TOO_OLD = "loader-too-old"
    OWNER_WRONG = "owner-wrong"
    EPOCH_TOO_OLD = "epoch-too-old"
    CLOCK_BEHIND = "clock-behind"
    BASE_WRONG = "base-wrong"
    FILE_MISSING = "file-missing"
    SIZE_WRONG = "size-wrong"
    NOT_SEALED = "not-sealed"
    SUITE_UNSUPPORTED = "suite-unsupported"
    CHUNK_SIZE_UNSUPPORTED = "chunk-size-unsupported"
    HEADER_OUT_OF_BOUNDS = "header-out-of-bounds"
    HEADER_MISMATCH = "header-mismatch"
    INDEX_WRONG = "index-wrong"
    RECIPIENT_MISSING = "recipient-missing"
    RECIPIENT_WRONG = "recipient-wrong"
    KEY_WRONG = "key-wrong"
    CHUNK_WRONG = "chunk-wrong"
    TOC_MALFORMED = "toc-malformed"
    GEOMETRY_WRONG = "geometry-wrong"
    UNREADABLE = "unreadable"


_DAMAGED: Final = "corrupted or tampered with"
_COPY_AGAIN: Final = "copy the package again and compare it with `strongroom package verify`"
_NEWER: Final = "take a newer release of this software"

# Outcome -> (message, hint).
WORDS: Final[dict[Outcome, tuple[str, str]]] = {
    Outcome.MANIFEST_MISSING: ("the directory holds no package: no `manifest.json`", "name the package"),
    Outcome.SIGNATURE_MISSING: ("the package has no `manifest.sig`", _COPY_AGAIN),
    Outcome.NOT_A_REGULAR_FILE: ("a file of the package is a link, folder or device", _COPY_AGAIN),
    Outcome.MANIFEST_OVERSIZED: ("`manifest.json` is empty or too large", _COPY_AGAIN),
    Outcome.SIGNATURE_MALFORMED: ("`manifest.sig` is not a signature of this format", _COPY_AGAIN),
    Outcome.SIGNER_UNKNOWN: ("the package is signed by a key that is not trusted", "configure its root"),
    Outcome.SIGNER_OF_OTHER_PARTY: (
        "the package is signed by the other party's key",
        "vendors sign base packages, customers sign adapters",
    ),
    Outcome.SIGNER_EXPIRED: ("the key that signed the package is no longer accepted", "get it signed anew"),
    Outcome.SIGNATURE_WRONG: ("`manifest.json` or its signature is " + _DAMAGED, _COPY_AGAIN),
    Outcome.MANIFEST_MALFORMED: ("`manifest.json` does not follow the format", "ask the package's owner"),
    Outcome.NAME_REFUSED: (
        "`manifest.json` names a file in a way that is refused",
        "ask the package's owner",
    ),
    Outcome.FORMAT_UNSUPPORTED: ("the package has another format version", _NEWER),
    Outcome.LOADER_TOO_OLD: ("the package asks for a newer loader", _NEWER),
    Outcome.OWNER_WRONG: ("the package belongs to the other party", "name the base and the adapter apart"),
    Outcome.EPOCH_TOO_OLD: ("the package was replaced by a newer one", "get the present package"),
    Outcome.CLOCK_BEHIND: ("the clock is behind the package's creation", "set the clock"),
    Outcome.BASE_WRONG: ("the package was not made for this base", "train it again on this base"),
    Outcome.FILE_MISSING: ("a sealed file is missing", _COPY_AGAIN),
    Outcome.SIZE_WRONG: ("a sealed file has another size than the manifest says", _COPY_AGAIN),
    Outcome.NOT_SEALED: ("a file that must be sealed is not", _COPY_AGAIN),
    Outcome.SUITE_UNSUPPORTED: ("a sealed file uses an unknown cipher suite", _NEWER),
    Outcome.CHUNK_SIZE_UNSUPPORTED: ("a sealed file uses an unknown chunk size", _NEWER),
    Outcome.HEADER_OUT_OF_BOUNDS: ("a sealed file's header is out of bounds", _COPY_AGAIN),
    Outcome.HEADER_MISMATCH: ("a sealed file belongs elsewhere", _COPY_AGAIN),
    Outcome.INDEX_WRONG: ("a sealed file's header or index is " + _DAMAGED, _COPY_AGAIN),
    Outcome.RECIPIENT_MISSING: ("the package is not wrapped for this key", "ask its owner to add this key"),
    Outcome.RECIPIENT_WRONG: ("the package's key does not unwrap", "ask its owner to wrap it again"),
    Outcome.KEY_WRONG: ("the key is not this package's", "name the key that belongs to the package"),
    Outcome.CHUNK_WRONG: (_DAMAGED, _COPY_AGAIN),
    Outcome.TOC_MALFORMED: ("a sealed file's table of contents is malformed", "ask the package's owner"),
    Outcome.GEOMETRY_WRONG: ("the lengths in a sealed file do not add up", "ask the package's owner"),
    Outcome.UNREADABLE: ("a file of the package cannot be read", "check permissions and the volume"),
}


class PackageError(Exception):
    """A package that was not opened; `outcome` says why, the text is the table's."""

    def __init__(self, outcome: Outcome) -> None:
        message, hint = WORDS[outcome]
        super().__init__(f"{message}\nhint: {hint}")
        self.outcome = outcome
        self.message = message
        self.hint = hint
