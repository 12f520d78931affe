"""From the data key to what opens a file. FORMAT.md 6.

Owns: the commitment, file keys, the cipher made from one. Must not know: where the data key comes from.
Invariant: a key derived here lies in a bytearray of its own until the cipher has it, and is then wiped.
"""

from __future__ import annotations

import hmac
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from model_package.outcome import Outcome, PackageError
from model_package.secret import wipe

COMMITMENT_LABEL: Final = b"strongroom/package/v1/commitment\0"
FILE_LABEL: Final = b"strongroom/package/v1/file\0"
COMMITMENT_BYTES: Final = 32
FILE_KEY_BYTES: Final = 32


def commitment(data_key: bytearray, package_id: bytes) -> bytes:
    """Return what a manifest says of its data key: no secret, and of no other key."""
    return HKDF(SHA256(), COMMITMENT_BYTES, package_id, COMMITMENT_LABEL).derive(data_key)


def check_commitment(data_key: bytearray, package_id: bytes, expected: bytes) -> None:
    """Raise PackageError with KEY_WRONG unless `data_key` is the one committed to."""
    if not hmac.compare_digest(commitment(data_key, package_id), expected):
        raise PackageError(Outcome.KEY_WRONG)


def file_cipher(data_key: bytearray, package_id: bytes, file_id: bytes) -> AESGCM:
    """Return the cipher of one sealed file; its key goes when it does."""
    file_key = bytearray(FILE_KEY_BYTES)
    try:
        HKDF(SHA256(), FILE_KEY_BYTES, file_id, FILE_LABEL + package_id).derive_into(data_key, file_key)
        return AESGCM(file_key)
    finally:
        wipe(file_key)
