"""Ed25519 as used: who signed these bytes, for which purpose. RFC 8032.

Owns: keys' forms and ids, signing and checking under a purpose. Must not know: documents, trust, dates.
Invariant: a signature made for one purpose holds for no other; a public key of low order is never used.

The library accepts public keys of low order, for which one signature holds for any message (Wycheproof,
SmallOrderPublicKey): whoever could slip one into a list of trusted keys could sign everything.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from model_package.secret import take_over
from model_package.worded import WordedError

PUBLIC_BYTES: Final = 32
PRIVATE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
KEY_ID_BYTES: Final = 16

_KEY_ID_LABEL: Final = b"strongroom/package/v1/signer\0"
_FIELD: Final = 2**255 - 19
# The y of the points whose order divides 8: identity, order 2, order 4, and the two of order 8.
_LOW_ORDER_Y: Final = frozenset(
    (
        1,
        _FIELD - 1,
        0,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    )
)


class SigningKeyError(WordedError):
    """Base of what this file raises.

    SigningKeyError
    |- SigningKeyRefused  not 32 bytes, not a point in its one form, or of low order
    |- SignatureRefused   another key, another purpose, or changed bytes
    """


class SigningKeyRefused(SigningKeyError):
    message = "the signing key is not a usable Ed25519 key"
    hint = "make one with `strongroom key make --kind signing`"


class SignatureRefused(SigningKeyError):
    message = "the signature does not hold"
    hint = "it was made by another key, or the document was corrupted or tampered with"


def make_private() -> bytearray:
    """Return a fresh Ed25519 private key of 32 bytes; the caller wipes it."""
    return take_over(Ed25519PrivateKey.generate().private_bytes_raw())


def public_of(private: bytearray) -> bytes:
    """Return the public half, 32 bytes. Raises SigningKeyRefused."""
    return _private_key(private).public_key().public_bytes_raw()


def key_id(public: bytes) -> bytes:
    """Return the KEY_ID_BYTES that name a public key in signatures (FORMAT.md 3): a choice, no proof."""
    return hashlib.sha256(_KEY_ID_LABEL + public).digest()[:KEY_ID_BYTES]


def sign(private: bytearray, purpose: bytes, document: bytes) -> bytes:
    """Return the signature, SIGNATURE_BYTES long, over `purpose | 0 | document`. Raises SigningKeyRefused."""
    return _private_key(private).sign(_signed(purpose, document))


def verify(public: bytes, purpose: bytes, document: bytes, signature: bytes) -> None:
    """Return if `public` signed `document` for `purpose`. Raises SigningKeyRefused, SignatureRefused."""
    check_public(public)
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(purpose, document))
        holds = True
    except InvalidSignature:
        holds = False
    if not holds:
        raise SignatureRefused


def check_public(public: bytes) -> None:
    """Raise SigningKeyRefused unless `public` is the one form of a point whose order is large."""
    y = int.from_bytes(public, "little") & (2**255 - 1)
    if len(public) != PUBLIC_BYTES or y >= _FIELD or y in _LOW_ORDER_Y:
        raise SigningKeyRefused


def _signed(purpose: bytes, document: bytes) -> bytes:
    assert b"\0" not in purpose, "the zero byte ends the purpose"
    return purpose + b"\0" + document


def _private_key(private: bytearray) -> Ed25519PrivateKey:
    if len(private) != PRIVATE_BYTES:
        raise SigningKeyRefused
    return Ed25519PrivateKey.from_private_bytes(private)
