"""Wycheproof's vectors for the other primitives, called the way the package calls them."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from model_package import signing_keys
from tests.model_package.public_vectors import wycheproof


def test_aes_256_gcm_opens_valid_vectors_in_place_and_no_other() -> None:
    """The form in use: 256-bit keys, 96-bit nonces, 128-bit tags, `decrypt_into` with a bytearray key."""
    used = {"ivSize": 96, "keySize": 256, "tagSize": 128}
    seen = {"valid": 0, "invalid": 0}
    for group, test in wycheproof("Cipher", "aes_gcm"):
        if any(group[name] != size for name, size in used.items()):
            continue
        plain = bytearray(len(test["msg"]) // 2)
        nonce, aad, body = (bytes.fromhex(test[name]) for name in ("iv", "aad", "ct"))
        try:
            AESGCM(bytearray.fromhex(test["key"])).decrypt_into(
                nonce, body + bytes.fromhex(test["tag"]), aad, plain
            )
            opened = plain == bytes.fromhex(test["msg"])
        except InvalidTag:
            opened = False
        assert opened == (test["result"] == "valid"), test["tcId"]
        seen[test["result"]] += 1
    assert seen["valid"] > 30 and seen["invalid"] > 20


def accepted(public: str, message: str, signature: str) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), bytes.fromhex(message)
        )
    except InvalidSignature:
        return False
    return True


def test_ed25519_accepts_valid_vectors_and_no_invalid_one() -> None:
    seen = {"valid": 0, "invalid": 0, "acceptable": 0}
    for group, test in wycheproof("Signature", "ed25519"):
        seen[test["result"]] += 1
        if test["result"] != "acceptable":  # left to the next test
            holds = accepted(group["publicKey"]["pk"], test["msg"], test["sig"])
            assert holds == (test["result"] == "valid"), test["tcId"]
    assert seen["valid"] > 50 and seen["invalid"] > 50 and seen["acceptable"] > 20


def test_a_signing_key_of_low_order_is_refused_though_the_library_takes_it() -> None:
    """One signature under such a key holds for any message."""
    small = [pair for pair in wycheproof("Signature", "ed25519") if "SmallOrderPublicKey" in pair[1]["flags"]]
    assert len(small) == 8
    for group, test in small:
        public = group["publicKey"]["pk"]
        assert accepted(public, test["msg"], test["sig"])
        with pytest.raises(signing_keys.SigningKeyRefused):
            signing_keys.verify(bytes.fromhex(public), b"p", b"d", bytes(64))


def test_another_form_of_a_low_order_key_is_refused_too() -> None:
    field = 2**255 - 19
    forms = [y | sign << 255 for y in (0, 1, field - 1, field, field + 1, 2**255 - 1) for sign in (0, 1)]
    for form in forms:
        with pytest.raises(signing_keys.SigningKeyRefused):
            signing_keys.check_public(form.to_bytes(32, "little"))
    for length in (0, 31, 33):
        with pytest.raises(signing_keys.SigningKeyRefused):
            signing_keys.check_public(bytes(range(100, 100 + length)))


def test_a_signature_holds_for_its_purpose_its_document_and_its_key_alone() -> None:
    private, other = signing_keys.make_private(), signing_keys.make_private()
    public = signing_keys.public_of(private)
    signature = signing_keys.sign(private, b"licence/v1", b"document")
    assert len(signature) == signing_keys.SIGNATURE_BYTES
    signing_keys.verify(public, b"licence/v1", b"document", signature)
    wrong = [
        (signing_keys.public_of(other), b"licence/v1", b"document", signature),
        (public, b"manifest/v1", b"document", signature),
        (public, b"licence/v", b"1document", signature),
        (public, b"licence/v1", b"documens", signature),
        (public, b"licence/v1", b"document", signature[:-1]),
        (public, b"licence/v1", b"document", bytes(64)),
    ]
    for arguments in wrong:
        with pytest.raises(signing_keys.SignatureRefused):
            signing_keys.verify(*arguments)


def test_a_signing_key_of_another_length_is_refused() -> None:
    for length in (0, 31, 33):
        with pytest.raises(signing_keys.SigningKeyRefused):
            signing_keys.sign(bytearray(length), b"p", b"d")
        with pytest.raises(signing_keys.SigningKeyRefused):
            signing_keys.public_of(bytearray(length))


def test_hkdf_sha256_agrees_with_every_vector() -> None:
    for _, test in wycheproof("Protocol", "hkdf_sha256"):
        salt, info, ikm = (bytes.fromhex(test[name]) for name in ("salt", "info", "ikm"))
        try:
            okm = HKDF(hashes.SHA256(), test["size"], salt, info).derive(ikm)
        except ValueError:  # more than 255 hashes long
            okm = b""
        assert (okm.hex() == test["okm"] and bool(okm)) == (test["result"] == "valid"), test["tcId"]
