"""Who can unwrap a package's data key. FORMAT.md 7.

Owns: the recipient entries, their bounds, what a wrapped key is bound to, wrapping for public keys.
Must not know: where private keys come from, the key service, files.
Invariant: an entry that exists has the lengths of its scheme; a data key is only ever in a bytearray.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

import msgspec

from model_package import hpke
from model_package.outcome import Outcome, PackageError

DATA_KEY_BYTES: Final = 32
MAX_RECIPIENTS: Final = 64
KEY_LABEL: Final = b"strongroom/package/v1/recipient-key\0"
WRAP_LABEL: Final = b"strongroom/package/v1/recipient\0"

Hex32 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Hex = Annotated[str, msgspec.Meta(pattern=r"\A(?:[0-9a-f]{2})*\Z", max_length=2 * 6144)]


class Owner(enum.StrEnum):
    """Whose package it is."""

    VENDOR = "vendor"
    CUSTOMER = "customer"


OWNER_CODES: Final = {Owner.VENDOR: 1, Owner.CUSTOMER: 2}


class Scheme(enum.StrEnum):
    """How a data key is wrapped."""

    X25519 = "x25519"
    MLKEM768_X25519 = "mlkem768x25519"
    KMS = "kms"


class _Lengths(NamedTuple):
    """Of an entry, in bytes."""

    encapsulated: int
    least_ciphertext: int
    most_ciphertext: int


_LENGTHS: Final = {
    Scheme.X25519: _Lengths(32, 48, 48),
    Scheme.MLKEM768_X25519: _Lengths(1120, 48, 48),
    Scheme.KMS: _Lengths(0, 1, 6144),
}


class Recipient(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `recipients`, as in the manifest."""

    ciphertext: Hex
    encapsulated: Hex
    key_id: Hex32
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class KeyContext:
    """What a wrapped data key is bound to: it unwraps for this package and this owner only."""

    package_id: bytes
    content_sha256: bytes
    owner: Owner

    def info(self) -> bytes:
        """Return HPKE's `info`."""
        return WRAP_LABEL + self.package_id + self.content_sha256 + bytes([OWNER_CODES[self.owner]])

    def encryption_context(self) -> dict[str, str]:
        """Return the key service's encryption context."""
        return {
            "strongroom:package_id": self.package_id.hex(),
            "strongroom:content_sha256": self.content_sha256.hex(),
            "strongroom:owner": self.owner.value,
        }


def key_id(scheme: Scheme, recipient_key: bytes) -> str:
    """Return the id under which `recipient_key` (a public key, or an ARN in ASCII) stands in a manifest."""
    digest = hashlib.sha256(KEY_LABEL + scheme.value.encode() + b"\0" + recipient_key)
    return digest.digest()[:16].hex()


def check(recipients: Sequence[Recipient]) -> None:
    """Raise PackageError with MANIFEST_MALFORMED unless the entries follow FORMAT.md 7.1."""
    places = [(entry.scheme.value, entry.key_id) for entry in recipients]
    fits = all(_fits(entry) for entry in recipients)
    if not fits or len(recipients) > MAX_RECIPIENTS or places != sorted(set(places)):
        raise PackageError(Outcome.MANIFEST_MALFORMED)


def arranged(recipients: Iterable[Recipient]) -> tuple[Recipient, ...]:
    """Return the entries in the order of a manifest."""
    return tuple(sorted(recipients, key=lambda entry: (entry.scheme.value, entry.key_id)))


def wrap(data_key: bytearray, public_key: bytes, context: KeyContext) -> Recipient:
    """Return `data_key` wrapped for the holder of `public_key`: X25519 (32 bytes) or hybrid (1,216).

    Raises hpke.PublicKeyRefused.
    """
    sealed = hpke.seal(public_key, context.info(), data_key)
    scheme = scheme_of(public_key)
    encapsulated = _LENGTHS[scheme].encapsulated
    return Recipient(
        ciphertext=sealed[encapsulated:].hex(),
        encapsulated=sealed[:encapsulated].hex(),
        key_id=key_id(scheme, public_key),
        scheme=scheme,
    )


def scheme_of(public_key: bytes) -> Scheme:
    """Return how a data key is wrapped for a public key of this length."""
    return Scheme.X25519 if len(public_key) == hpke.PUBLIC_BYTES else Scheme.MLKEM768_X25519


def find(recipients: Sequence[Recipient], scheme: Scheme, recipient_key: bytes) -> Recipient:
    """Return the entry for `recipient_key`. Raises PackageError with RECIPIENT_MISSING."""
    wanted = key_id(scheme, recipient_key)
    for entry in recipients:
        if entry.scheme is scheme and entry.key_id == wanted:
            return entry
    raise PackageError(Outcome.RECIPIENT_MISSING)


def unwrap(recipients: Sequence[Recipient], private_key: bytearray, context: KeyContext) -> bytearray:
    """Return the data key, which the caller wipes, by a `private_key` of 32 bytes, of either kind.

    Raises PackageError with RECIPIENT_MISSING or RECIPIENT_WRONG.
    """
    entry = _addressed(recipients, private_key)
    hybrid = entry.scheme is Scheme.MLKEM768_X25519
    sealed = bytes.fromhex(entry.encapsulated + entry.ciphertext)
    data_key: bytearray | None = None
    try:
        data_key = hpke.open_(private_key, context.info(), sealed, hybrid=hybrid)
    except hpke.HpkeError:
        data_key = None  # raised below, outside the handler: the traceback would hold the key
    if data_key is None or len(data_key) != DATA_KEY_BYTES:
        raise PackageError(Outcome.RECIPIENT_WRONG)
    return data_key


def _addressed(recipients: Sequence[Recipient], private_key: bytearray) -> Recipient:
    """Return the entry for the holder of `private_key`, whichever kind it is. Raises PackageError."""
    if any(entry.scheme is Scheme.MLKEM768_X25519 for entry in recipients):
        wanted = key_id(Scheme.MLKEM768_X25519, hpke.hybrid_public_of(private_key))
        for entry in recipients:
            if (entry.scheme, entry.key_id) == (Scheme.MLKEM768_X25519, wanted):
                return entry
    return find(recipients, Scheme.X25519, hpke.public_of(private_key))


def _fits(entry: Recipient) -> bool:
    lengths = _LENGTHS[entry.scheme]
    ciphertext, encapsulated = len(entry.ciphertext) // 2, len(entry.encapsulated) // 2
    return (
        encapsulated == lengths.encapsulated
        and lengths.least_ciphertext <= ciphertext <= lengths.most_ciphertext
    )
