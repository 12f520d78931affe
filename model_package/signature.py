"""Who made a package: Ed25519 over the manifest's bytes. FORMAT.md 3.

Owns: `manifest.sig`, roots of trust. Must not know: what the manifest says.
Invariant: a signature holds only under a root that the caller gave for the expected owner; nothing of the
package chooses a root beyond naming it, and no algorithm is ever read from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from model_package import signing_keys
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner

MAGIC: Final = b"SLDSIG\x01\x00"
SIGNATURE_FILE_BYTES: Final = 88
MAX_ROOTS: Final = 16
MANIFEST_PURPOSE: Final = b"strongroom/package/v1/manifest"


@dataclass(frozen=True, slots=True)
class Root:
    """A public key that may sign packages, until `not_after_s` (seconds since 1970; None is for ever).

    Raises signing_keys.SigningKeyRefused for a key that is not one.
    """

    public_key: bytes
    not_after_s: int | None = None

    def __post_init__(self) -> None:
        signing_keys.check_public(self.public_key)

    @property
    def signer_id(self) -> bytes:
        return signing_keys.key_id(self.public_key)


@dataclass(frozen=True, slots=True)
class Roots:
    """Whom the caller trusts to sign, by owner."""

    vendor: tuple[Root, ...] = ()
    customer: tuple[Root, ...] = ()

    def __post_init__(self) -> None:
        if len(self.vendor) > MAX_ROOTS or len(self.customer) > MAX_ROOTS:
            raise ValueError(f"more than {MAX_ROOTS} roots for one owner")

    def of(self, owner: Owner) -> tuple[Root, ...]:
        return self.vendor if owner is Owner.VENDOR else self.customer


def sign(document: bytes, private: bytearray, purpose: bytes = MANIFEST_PURPOSE) -> bytes:
    """Return the content of `manifest.sig` for a manifest; `private` is an Ed25519 key of 32 bytes."""
    signer_id = signing_keys.key_id(signing_keys.public_of(private))
    return MAGIC + signer_id + signing_keys.sign(private, purpose, document)


def check(
    signature: bytes,
    document: bytes,
    roots: Roots,
    owner: Owner,
    now_s: int,
    purpose: bytes = MANIFEST_PURPOSE,
) -> Root:
    """Return the root under which `signature`, for a manifest the content of `manifest.sig`, holds.

    Raises PackageError with SIGNATURE_MALFORMED, SIGNER_UNKNOWN, SIGNER_OF_OTHER_PARTY, SIGNER_EXPIRED or
    SIGNATURE_WRONG, in that order.
    """
    if len(signature) != SIGNATURE_FILE_BYTES or not signature.startswith(MAGIC):
        raise PackageError(Outcome.SIGNATURE_MALFORMED)
    end = len(MAGIC) + signing_keys.KEY_ID_BYTES
    root = _select(signature[len(MAGIC) : end], roots, owner)
    if root.not_after_s is not None and now_s > root.not_after_s:
        raise PackageError(Outcome.SIGNER_EXPIRED)
    try:
        signing_keys.verify(root.public_key, purpose, document, signature[end:])
        holds = True
    except signing_keys.SignatureRefused:
        holds = False
    if not holds:
        raise PackageError(Outcome.SIGNATURE_WRONG)
    return root


def _select(signer_id: bytes, roots: Roots, owner: Owner) -> Root:
    for root in roots.of(owner):
        if root.signer_id == signer_id:
            return root
    other = Owner.CUSTOMER if owner is Owner.VENDOR else Owner.VENDOR
    if any(root.signer_id == signer_id for root in roots.of(other)):
        raise PackageError(Outcome.SIGNER_OF_OTHER_PARTY)
    raise PackageError(Outcome.SIGNER_UNKNOWN)
