"""Public keys as people send them: `x25519:` or `ed25519:` and 64 hex digits, a hybrid's with 2,432.

Owns: that text form, and the id by which two people compare a key. Must not know: private keys.
Invariant: a key that was parsed is of its kind and usable; its id is the one in manifests and licences.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from model_package import hpke, recipients, signing_keys
from model_package.recipients import Scheme
from model_package.refusal import KeyRefused, Refusal

_FORM: Final = re.compile(r"(x25519|ed25519|mlkem768x25519):([0-9a-f]{64}|[0-9a-f]{2432})")


class Kind(enum.StrEnum):
    """What a key pair is for."""

    RECIPIENT = "x25519"  # data keys are wrapped for it: an installation's, a party's own
    HYBRID = "mlkem768x25519"  # as RECIPIENT, and shut also where X25519 has fallen
    SIGNING = "ed25519"


_BYTES: Final = {
    Kind.RECIPIENT: hpke.PUBLIC_BYTES,
    Kind.HYBRID: hpke.HYBRID_PUBLIC_BYTES,
    Kind.SIGNING: signing_keys.PUBLIC_BYTES,
}


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key and its kind."""

    kind: Kind
    raw: bytes

    @property
    def text(self) -> str:
        return f"{self.kind.value}:{self.raw.hex()}"

    @property
    def id(self) -> str:
        """The id, hex: FORMAT.md 7.1 for recipients, 3 for signers."""
        if self.kind is Kind.SIGNING:
            return signing_keys.key_id(self.raw).hex()
        return recipients.key_id(Scheme(self.kind.value), self.raw)


def parse(text: str, *kinds: Kind) -> PublicKey:
    """Return the key in `text`, which may end in a line end; with `kinds`, no other is taken.

    Raises KeyRefused with PUBLIC_KEY_MALFORMED.
    """
    form = _FORM.fullmatch(text.removesuffix("\n"))
    usable = form is not None and len(form[2]) == 2 * _BYTES[Kind(form[1])]
    usable = usable and (form is None or not kinds or Kind(form[1]) in kinds)
    if form is not None and form[1] == Kind.SIGNING:
        try:
            signing_keys.check_public(bytes.fromhex(form[2]))
        except signing_keys.SigningKeyRefused:
            usable = False
    if form is None or not usable:
        raise KeyRefused(Refusal.PUBLIC_KEY_MALFORMED)
    return PublicKey(Kind(form[1]), bytes.fromhex(form[2]))
