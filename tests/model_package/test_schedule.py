"""Keys that follow from the data key: as FORMAT.md 6 says, bound to what it says, wiped."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from model_package import schedule
from model_package.outcome import Outcome, PackageError
from tests.model_package import making

PACKAGE_ID, FILE_ID = bytes(range(16)), bytes(range(16, 32))


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 of RFC 5869 for 32 bytes, from the standard library."""
    extracted = hmac.digest(salt, key, hashlib.sha256)
    return hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def test_the_commitment_is_the_documents() -> None:
    expected = hkdf(bytes(making.key("data")), PACKAGE_ID, b"strongroom/package/v1/commitment\0")
    assert schedule.commitment(making.key("data"), PACKAGE_ID) == expected


def test_the_file_key_is_the_documents_and_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytearray it lay in is seen at the moment the cipher is made from it, and afterwards."""
    seen: list[tuple[bytes, bytearray]] = []

    def watching(file_key: bytearray) -> AESGCM:
        seen.append((bytes(file_key), file_key))
        return AESGCM(file_key)

    monkeypatch.setattr(schedule, "AESGCM", watching)
    cipher = schedule.file_cipher(making.key("data"), PACKAGE_ID, FILE_ID)
    ((then, now),) = seen
    assert then == hkdf(bytes(making.key("data")), FILE_ID, b"strongroom/package/v1/file\0" + PACKAGE_ID)
    assert now == bytearray(32)
    sealed = AESGCM(then).encrypt(bytes(12), b"plain", b"bound")
    assert cipher.decrypt(bytes(12), sealed, b"bound") == b"plain"  # the cipher does not need the bytearray


def test_every_input_of_a_file_key_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bytes] = set()

    def watching(file_key: bytearray) -> AESGCM:
        seen.add(bytes(file_key))
        return AESGCM(file_key)

    monkeypatch.setattr(schedule, "AESGCM", watching)
    for name in ("data", "another"):
        for package_id in (PACKAGE_ID, FILE_ID):
            for file_id in (PACKAGE_ID, FILE_ID):
                schedule.file_cipher(making.key(name), package_id, file_id)
    assert len(seen) == 8


@pytest.mark.parametrize(
    "wrong", [making.key("another"), making.key("data")[:31], making.key("data") + b"\0", b""]
)
def test_another_key_of_any_length_is_not_the_one_committed_to(wrong: bytearray) -> None:
    expected = schedule.commitment(making.key("data"), PACKAGE_ID)
    schedule.check_commitment(making.key("data"), PACKAGE_ID, expected)
    with pytest.raises(PackageError) as caught:
        schedule.check_commitment(bytearray(wrong), PACKAGE_ID, expected)
    assert caught.value.outcome is Outcome.KEY_WRONG
