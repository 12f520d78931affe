"""Why a key, a licence or an unlock call was refused: one closed list, no text from anywhere else.

Owns: the refusals, their messages and hints. Must not know: how anything is checked.
Invariant: a KeyRefused names one refusal and holds no key, path, name or date; it is raised outside handlers,
so that no traceback holds what was being read.
"""

from __future__ import annotations

import enum
from typing import Final


class Refusal(enum.StrEnum):
    """Closed list; KEYS.md says what to do about each group."""

    SOURCE_UNKNOWN = "source-unknown"
    SOURCE_MALFORMED = "source-malformed"
    SOURCE_FOR_DEVELOPMENT = "source-for-development"
    SOURCE_NOT_BUILT = "source-not-built"
    SOURCE_WITHOUT_SERVICE = "source-without-service"
    SOURCE_WITHOUT_CALLS = "source-without-calls"
    SOURCE_WITHOUT_ROOTS = "source-without-roots"
    SOURCE_USED_UP = "source-used-up"
    KEY_MISSING = "key-missing"
    KEY_NOT_REGULAR = "key-not-regular"
    KEY_EXPOSED = "key-exposed"
    KEY_UNREADABLE = "key-unreadable"
    KEY_LENGTH_WRONG = "key-length-wrong"
    KEY_NOT_UNLINKED = "key-not-unlinked"
    KEY_FILE_EXISTS = "key-file-exists"
    KEY_NOT_WRITTEN = "key-not-written"
    PUBLIC_KEY_MALFORMED = "public-key-malformed"
    SHARES_EQUAL = "shares-equal"
    SERVICE_REFUSED = "service-refused"
    SERVICE_UNREACHABLE = "service-unreachable"
    UNLOCK_MALFORMED = "unlock-malformed"
    UNLOCK_FOR_ANOTHER_PACKAGE = "unlock-for-another-package"
    UNLOCK_FOR_ANOTHER_CONTAINER = "unlock-for-another-container"
    UNLOCK_REPLAYED = "unlock-replayed"
    UNLOCK_WRONG = "unlock-wrong"
    CONTAINER_UNEXPECTED = "container-unexpected"
    UNLOCK_PENDING = "unlock-pending"
    LICENCE_MISSING = "licence-missing"
    LICENCE_UNREADABLE = "licence-unreadable"
    LICENCE_OVERSIZED = "licence-oversized"
    LICENCE_MALFORMED = "licence-malformed"
    LICENCE_SIGNER_UNKNOWN = "licence-signer-unknown"
    LICENCE_SIGNER_EXPIRED = "licence-signer-expired"
    LICENCE_CHANGED = "licence-changed"
    LICENCE_NOT_YET_VALID = "licence-not-yet-valid"
    LICENCE_EXPIRED = "licence-expired"
    LICENCE_FOR_ANOTHER_PACKAGE = "licence-for-another-package"
    LICENCE_FOR_ANOTHER_INSTALLATION = "licence-for-another-installation"
    LICENCE_TERMS_UNBOUND = "licence-terms-unbound"
    LICENCE_EPOCH_ABOVE_PACKAGE = "licence-epoch-above-package"
    LICENCE_FOR_VENDOR_PACKAGES = "licence-for-vendor-packages"
    CLOCK_TURNED_BACK = "clock-turned-back"
    CLOCK_STATE_MALFORMED = "clock-state-malformed"
    CLOCK_STATE_UNWRITABLE = "clock-state-unwritable"


_MAKE: Final = "make one with `strongroom key make`"
_ASK: Final = "ask the vendor for a new licence"
_AGAIN: Final = "call `describe` again and seal the key to what it returns"
_FORMS: Final = (
    "`file:/PATH`, `file:/PATH?unlink`, `fd:N`, `channel:NAME`, `image:/PATH,/PATH`, `recipient:SOURCE`, "
    "`licence:/PATH,SOURCE`, `kms:ARN`, `invocation:`"
)

# Refusal -> (message, hint).
WORDS: Final[dict[Refusal, tuple[str, str]]] = {
    Refusal.SOURCE_UNKNOWN: ("the key source is none of the known ones", f"give one of {_FORMS}"),
    Refusal.SOURCE_MALFORMED: ("the key source is not written in its one form", f"give one of {_FORMS}"),
    Refusal.SOURCE_FOR_DEVELOPMENT: (
        "`env:` is for development: the variable stays readable in the process's environment block",
        "use `file:` or `fd:`",
    ),
    Refusal.SOURCE_NOT_BUILT: (
        "`attest:` is not part of this version: no attested key release is built in",
        "use `file:`, `licence:` or `invocation:`",
    ),
    Refusal.SOURCE_WITHOUT_SERVICE: (
        "`kms:` cannot be used here: this process has no key service",
        "an isolated endpoint reaches no service: use `licence:`, `image:` or `invocation:`",
    ),
    Refusal.SOURCE_WITHOUT_CALLS: (
        "`invocation:` cannot be used here: this process answers no calls",
        "use it for a served endpoint alone",
    ),
    Refusal.SOURCE_WITHOUT_ROOTS: (
        "`licence:` cannot be used here: no vendor root is configured",
        "configure the vendor's root",
    ),
    Refusal.SOURCE_USED_UP: (
        "the key source can be read once and was",
        "start the container anew, or use a source that can be read again, such as `file:`",
    ),
    Refusal.KEY_MISSING: ("the key is not where the key source says", "check the path, descriptor or name"),
    Refusal.KEY_NOT_REGULAR: ("the key's path is a folder, pipe or device", "name a regular file"),
    Refusal.KEY_EXPOSED: ("the key file is open to its group or to everybody", "`chmod 0400` the file"),
    Refusal.KEY_UNREADABLE: ("the key cannot be read", "check owner and mode against the user that serves"),
    Refusal.KEY_LENGTH_WRONG: ("the key is not 32 bytes, nor 64 digits of lower-case hex", _MAKE),
    Refusal.KEY_NOT_UNLINKED: (
        "the key file could not be removed",
        "mount its folder writable, or drop `?unlink`",
    ),
    Refusal.KEY_FILE_EXISTS: ("a file of this name exists and is never overwritten", "choose another name"),
    Refusal.KEY_NOT_WRITTEN: ("the file could not be written", "check the folder and the space left"),
    Refusal.PUBLIC_KEY_MALFORMED: (
        "the public key is not a known kind, a colon and as many digits of lower-case hex as it has",
        "print it again with `strongroom key public`",
    ),
    Refusal.SHARES_EQUAL: (
        "the share of the image and that of the artifact are the same",
        "name one share of each; their XOR is the key",
    ),
    Refusal.SERVICE_REFUSED: (
        "the key service did not decrypt the key",
        "check that the grant exists, is not retired, and names this package",
    ),
    Refusal.SERVICE_UNREACHABLE: (
        "the key service cannot be reached",
        "check route, endpoint and credentials",
    ),
    Refusal.UNLOCK_MALFORMED: ("the unlock message is not in its one form", "use the client helper"),
    Refusal.UNLOCK_FOR_ANOTHER_PACKAGE: ("the unlock message is for another package", _AGAIN),
    Refusal.UNLOCK_FOR_ANOTHER_CONTAINER: ("the unlock message is for another container or start", _AGAIN),
    Refusal.UNLOCK_REPLAYED: ("the unlock message was used before", _AGAIN),
    Refusal.UNLOCK_WRONG: ("the unlock message does not open here", _AGAIN),
    Refusal.CONTAINER_UNEXPECTED: (
        "the container describes another base or image than expected",
        "check which endpoint is called, and what it was deployed with",
    ),
    Refusal.UNLOCK_PENDING: ("the package is locked: no unlock message has come yet", _AGAIN),
    Refusal.LICENCE_MISSING: ("there is no licence file where the key source says", "check the path"),
    Refusal.LICENCE_UNREADABLE: ("the licence file cannot be read", "check owner and mode"),
    Refusal.LICENCE_OVERSIZED: ("the licence file is larger than any licence", "check the path"),
    Refusal.LICENCE_MALFORMED: ("the licence does not follow its format", _ASK),
    Refusal.LICENCE_SIGNER_UNKNOWN: (
        "the licence is signed by a key that is not trusted as a vendor's",
        "check whose licence this is, and the configured vendor roots",
    ),
    Refusal.LICENCE_SIGNER_EXPIRED: ("the key that signed the licence is no longer accepted", _ASK),
    Refusal.LICENCE_CHANGED: (
        "the licence was changed after it was signed",
        "restore the file as the vendor sent it",
    ),
    Refusal.LICENCE_NOT_YET_VALID: (
        "the licence is not valid yet",
        "check the clock and the licence's dates",
    ),
    Refusal.LICENCE_EXPIRED: ("the licence has expired, and its days of grace are over", _ASK),
    Refusal.LICENCE_FOR_ANOTHER_PACKAGE: ("the licence does not name this package", _ASK),
    Refusal.LICENCE_FOR_ANOTHER_INSTALLATION: (
        "the licence was made for another installation's key",
        "send the vendor what `strongroom key public` prints here",
    ),
    Refusal.LICENCE_TERMS_UNBOUND: (
        "the licence's terms are not those its key was wrapped under",
        _ASK,
    ),
    Refusal.LICENCE_EPOCH_ABOVE_PACKAGE: (
        "the licence revokes packages as old as this one",
        "get the vendor's present package",
    ),
    Refusal.LICENCE_FOR_VENDOR_PACKAGES: (
        "a licence opens a vendor's package, and this one is a customer's",
        "give the adapter's own key",
    ),
    Refusal.CLOCK_TURNED_BACK: (
        "the clock is behind the last start that this installation recorded",
        "set the clock",
    ),
    Refusal.CLOCK_STATE_MALFORMED: (
        "the recorded time of the last start is damaged",
        "ask the vendor before removing the file",
    ),
    Refusal.CLOCK_STATE_UNWRITABLE: (
        "the time of this start cannot be recorded in the state directory",
        "make the state directory writable for the user that serves",
    ),
}


class KeyRefused(Exception):
    """A key that was not handed out; `refusal` says why, the text is the table's."""

    def __init__(self, refusal: Refusal) -> None:
        message, hint = WORDS[refusal]
        super().__init__(f"{message}\nhint: {hint}")
        self.refusal = refusal
        self.message = message
        self.hint = hint
