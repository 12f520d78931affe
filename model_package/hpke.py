"""HPKE, base mode: a short secret sealed to the holder of an X25519 or a hybrid key. RFC 9180.

Owns: the two suites and the form `enc | ciphertext`. Must not know: what is sealed, to whom, or why.
Invariant: DHKEM(X25519, HKDF-SHA256) or the hybrid MLKEM768-X25519, HKDF-SHA256, AES-256-GCM and nothing
else; a low-order point, which would make X25519's shared secret zero, is refused by both; what was opened
lies in one bytearray.

    sealed = enc (32 or 1,120 bytes) | ciphertext (as long as the plaintext) | tag (16 bytes)

The hybrid (draft-ietf-hpke-pq, KEM 0x647a; X-Wing) holds while either of its halves does: ciphertexts kept
today stay shut when X25519 falls. Its private key is a seed of 32 bytes, which SHAKE256 makes into both
halves. One seed must not serve both kinds: whoever finds it from the X25519 key has the hybrid's too.

The associated data is empty: in single-shot use `info` binds the context as well (RFC 9180, 8.1), and the
library's own interface takes nothing else. The computation is the library's.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from model_package.secret import take_over, wiping
from model_package.worded import WordedError

PUBLIC_BYTES: Final = 32
PRIVATE_BYTES: Final = 32
ENC_BYTES: Final = 32
HYBRID_PUBLIC_BYTES: Final = 1216  # ML-KEM-768's 1,184, then X25519's
HYBRID_ENC_BYTES: Final = 1120  # ML-KEM-768's 1,088, then X25519's
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = ENC_BYTES + TAG_BYTES

_MLKEM_PUBLIC_BYTES: Final = 1184
_MLKEM_SEED_BYTES: Final = 64
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_HYBRID_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class HpkeError(WordedError):
    """Base of what this file raises.

    HpkeError
    |- PublicKeyRefused   neither 32 nor 1,216 bytes, no key of ML-KEM, or a point of low order
    |- PrivateKeyRefused  not 32 bytes
    |- OpenRefused        another key, another context, or changed bytes: which of them cannot be told
    """


class PublicKeyRefused(HpkeError):
    message = "the public key is not a usable X25519 or hybrid key"
    hint = "print it again with `strongroom key public` where its private half lies"


class PrivateKeyRefused(HpkeError):
    message = "the private key is not 32 bytes"
    hint = "make one with `strongroom key make`"


class OpenRefused(HpkeError):
    message = "the sealed secret does not open with this key in this context"
    hint = "it was sealed to another key, for another package, or was corrupted or tampered with"


def make_private() -> bytearray:
    """Return a fresh private key of 32 bytes, for one kind or the other; the caller wipes it."""
    return take_over(X25519PrivateKey.generate().private_bytes_raw())


def public_of(private: bytearray) -> bytes:
    """Return the X25519 public half, 32 bytes. Raises PrivateKeyRefused."""
    return _private_key(private).public_key().public_bytes_raw()


def hybrid_public_of(private: bytearray) -> bytes:
    """Return the hybrid public half, HYBRID_PUBLIC_BYTES long. Raises PrivateKeyRefused."""
    mlkem, x25519 = _halves(private)
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def seal(recipient_public: bytes, info: bytes, plaintext: bytes | bytearray) -> bytes:
    """Return `plaintext` sealed to `recipient_public`, OVERHEAD_BYTES longer: SealBase of RFC 9180, 6.1.

    `info` must be given again to open it. Raises PublicKeyRefused.
    """
    sealed = b""
    try:
        if len(recipient_public) == PUBLIC_BYTES:
            public = X25519PublicKey.from_public_bytes(recipient_public)
            sealed = _SUITE.encrypt(plaintext, public, info)
        elif len(recipient_public) == HYBRID_PUBLIC_BYTES:
            mlkem = MLKEM768PublicKey.from_public_bytes(recipient_public[:_MLKEM_PUBLIC_BYTES])
            x25519 = X25519PublicKey.from_public_bytes(recipient_public[_MLKEM_PUBLIC_BYTES:])
            sealed = _HYBRID_SUITE.encrypt(plaintext, MLKEM768X25519PublicKey(mlkem, x25519), info)
    except ValueError:  # the shared secret would be zero, or ML-KEM's part is no key
        sealed = b""
    if not sealed:
        raise PublicKeyRefused
    return sealed


def open_(recipient_private: bytearray, info: bytes, sealed: bytes, *, hybrid: bool = False) -> bytearray:
    """Return what was sealed to `recipient_private`; the caller wipes it: OpenBase of RFC 9180, 6.1.

    Raises PrivateKeyRefused, OpenRefused.
    """
    private: X25519PrivateKey | MLKEM768X25519PrivateKey
    suite, private = _SUITE, _private_key(recipient_private)
    if hybrid:
        suite, private = _HYBRID_SUITE, MLKEM768X25519PrivateKey(*_halves(recipient_private))
    opened: bytes | None
    try:
        opened = suite.decrypt(sealed, private, info)
    except (InvalidTag, ValueError):  # ValueError: a low-order ephemeral key
        opened = None
    finally:
        del private  # the traceback of what is raised below holds this frame
    if opened is None:  # outside the handler, whose exception holds more frames
        raise OpenRefused
    return take_over(opened)


def _halves(private: bytearray) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """Return both private keys that a seed means. Raises PrivateKeyRefused."""
    if len(private) != PRIVATE_BYTES:
        raise PrivateKeyRefused
    expanded = take_over(hashlib.shake_256(private).digest(_MLKEM_SEED_BYTES + PRIVATE_BYTES))
    seed, scalar = expanded[:_MLKEM_SEED_BYTES], expanded[_MLKEM_SEED_BYTES:]
    with wiping(expanded), wiping(seed), wiping(scalar):
        return MLKEM768PrivateKey.from_seed_bytes(seed), X25519PrivateKey.from_private_bytes(scalar)


def _private_key(private: bytearray) -> X25519PrivateKey:
    if len(private) != PRIVATE_BYTES:
        raise PrivateKeyRefused
    return X25519PrivateKey.from_private_bytes(private)
