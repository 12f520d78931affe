"""HPKE as used: RFC 9180's own vector, Wycheproof's X25519 points, and every way a message must not open."""

from __future__ import annotations

import random
import traceback
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from model_package import hpke
from tests.model_package.public_vectors import hpke_pq, rfc9180, wycheproof

SECRET = bytes(range(32))


@pytest.fixture
def private() -> bytearray:
    return hpke.make_private()


def of_vector(aead: int, cipher: type[AESGCM | ChaCha20Poly1305]) -> tuple[bytearray, bytes, bytes]:
    """Return the vector's private key and info, and a message under the key and nonce it states.

    Its own messages carry associated data, which ours never do: the last step is done again without.
    """
    vector = rfc9180(kem=0x0020, kdf=0x0001, aead=aead)
    key, nonce = bytes.fromhex(vector["key"]), bytes.fromhex(vector["base_nonce"])
    first = vector["encryptions"][0]
    stated = cipher(key).encrypt(nonce, bytes.fromhex(first["pt"]), bytes.fromhex(first["aad"]))
    assert stated == bytes.fromhex(first["ct"])
    sealed = bytes.fromhex(vector["enc"]) + cipher(key).encrypt(nonce, SECRET, b"")
    assert hpke.public_of(bytearray.fromhex(vector["skRm"])) == bytes.fromhex(vector["pkRm"])
    return bytearray.fromhex(vector["skRm"]), bytes.fromhex(vector["info"]), sealed


def test_a_message_under_the_key_that_rfc_9180s_vector_states_opens() -> None:
    private, info, sealed = of_vector(0x0002, AESGCM)
    assert hpke.open_(private, info, sealed) == SECRET


@pytest.mark.parametrize(("aead", "cipher"), [(0x0001, AESGCM), (0x0003, ChaCha20Poly1305)])
def test_a_message_of_another_suite_does_not_open(aead: int, cipher: type[AESGCM | ChaCha20Poly1305]) -> None:
    with pytest.raises(hpke.OpenRefused):
        hpke.open_(*of_vector(aead, cipher))


def test_what_is_sealed_opens_and_is_as_long_as_stated(private: bytearray) -> None:
    for length in (0, 1, 32, 4096):
        secret = random.Random(length).randbytes(length)
        sealed = hpke.seal(hpke.public_of(private), b"info", secret)
        assert len(sealed) == length + hpke.OVERHEAD_BYTES
        opened = hpke.open_(private, b"info", sealed)
        assert isinstance(opened, bytearray) and opened == secret


def test_two_sealings_share_nothing(private: bytearray) -> None:
    public = hpke.public_of(private)
    first, second = (hpke.seal(public, b"i", SECRET) for _ in range(2))
    assert first[: hpke.ENC_BYTES] != second[: hpke.ENC_BYTES]
    assert first[hpke.ENC_BYTES :] != second[hpke.ENC_BYTES :]


def test_another_key_or_another_info_does_not_open(private: bytearray) -> None:
    sealed = hpke.seal(hpke.public_of(private), b"info", SECRET)
    for key, info in [(hpke.make_private(), b"info"), (private, b"infp"), (private, b"inf"), (private, b"")]:
        with pytest.raises(hpke.OpenRefused) as raised:
            hpke.open_(key, info, sealed)
        assert raised.value.__context__ is None  # nothing that holds the key travels with the error


def test_a_refusal_keeps_no_private_key_alive(private: bytearray) -> None:
    with pytest.raises(hpke.OpenRefused) as raised:
        hpke.open_(private, b"info", bytes(80))
    frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
    assert len(frames) == 2
    held = [value for frame in frames for value in frame.f_locals.values()]
    assert not any(isinstance(value, X25519PrivateKey) for value in held)


def test_no_flipped_bit_and_no_other_length_opens(private: bytearray) -> None:
    sealed = hpke.seal(hpke.public_of(private), b"info", SECRET)
    changed = [
        sealed[: bit // 8] + bytes([sealed[bit // 8] ^ 1 << bit % 8]) + sealed[bit // 8 + 1 :]
        for bit in range(len(sealed) * 8)
    ]  # X25519 ignores the top bit of a public key; the KEM's context holds the 32 bytes as sent
    changed += [sealed[:length] for length in range(len(sealed))] + [sealed + b"\0"]
    for other in changed:
        with pytest.raises(hpke.OpenRefused):
            hpke.open_(private, b"info", other)


def test_x25519_agrees_with_every_vector_of_wycheproof() -> None:
    for _, test in wycheproof("Protocol", "x25519"):
        key = X25519PrivateKey.from_private_bytes(bytes.fromhex(test["private"]))
        public = X25519PublicKey.from_public_bytes(bytes.fromhex(test["public"]))
        shared = bytes.fromhex(test["shared"])
        if any(shared):
            assert key.exchange(public) == shared, test["tcId"]
        else:
            with pytest.raises(ValueError):
                key.exchange(public)


def test_a_low_order_point_is_refused_by_both_sides(private: bytearray) -> None:
    points = {test["public"] for _, test in wycheproof("Protocol", "x25519") if not int(test["shared"], 16)}
    assert len(points) >= 7
    for point in map(bytes.fromhex, points):
        with pytest.raises(hpke.PublicKeyRefused):
            hpke.seal(point, b"info", SECRET)
        with pytest.raises(hpke.OpenRefused):
            hpke.open_(private, b"info", point + bytes(48))


def test_what_the_library_returns_as_bytes_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched at the library's edge: freed memory is often reused before a search could find the copy."""
    held = [bytes(bytearray(SECRET)) for _ in range(2)]
    key = type("Key", (), {"private_bytes_raw": lambda _: held[0]})
    monkeypatch.setattr(X25519PrivateKey, "generate", staticmethod(key))
    private = hpke.make_private()
    monkeypatch.setattr(hpke, "_SUITE", type("Suite", (), {"decrypt": lambda *_: held[1]})())
    assert hpke.open_(private, b"info", bytes(80)) == SECRET == private
    assert held == [bytes(32), bytes(32)]


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(private: bytearray, length: int) -> None:
    with pytest.raises(hpke.PublicKeyRefused):
        hpke.seal(bytes(length), b"", SECRET)
    with pytest.raises(hpke.PrivateKeyRefused):
        hpke.open_(bytearray(length), b"", bytes(80))
    with pytest.raises(hpke.PrivateKeyRefused):
        hpke.public_of(bytearray(length))


def test_every_error_has_a_message_and_a_next_move() -> None:
    for kind in hpke.HpkeError.__subclasses__():
        assert kind.message and kind.hint and not kind.message.endswith(".")


def hybrid_vectors() -> list[dict[str, Any]]:
    wanted = {"mode": 0, "kem_id": 0x647A, "kdf_id": 1}
    found = [each for each in hpke_pq() if wanted.items() <= each.items()]
    assert found
    return found


def test_the_hybrid_agrees_with_the_drafts_vectors() -> None:
    """Their AEAD is ChaCha20-Poly1305: only the expansion and the KEM are ours."""
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    for vector in hybrid_vectors():
        assert vector["aead_id"] == 3
        private = bytearray.fromhex(vector["skRm"])
        assert hpke.hybrid_public_of(private) == bytes.fromhex(vector["pkRm"])
        key, nonce = bytes.fromhex(vector["key"]), bytes.fromhex(vector["base_nonce"])
        sealed = bytes.fromhex(vector["enc"]) + ChaCha20Poly1305(key).encrypt(nonce, SECRET, b"")
        both = hpke.MLKEM768X25519PrivateKey(*hpke._halves(private))
        assert suite.decrypt(sealed, both, bytes.fromhex(vector["info"])) == SECRET
        with pytest.raises(hpke.OpenRefused):  # ours is AES-256-GCM
            hpke.open_(private, bytes.fromhex(vector["info"]), sealed, hybrid=True)


def test_what_is_sealed_to_a_hybrid_key_opens_with_it_and_nothing_else(private: bytearray) -> None:
    sealed = hpke.seal(hpke.hybrid_public_of(private), b"info", SECRET)
    assert len(sealed) == hpke.HYBRID_ENC_BYTES + len(SECRET) + hpke.TAG_BYTES
    assert hpke.open_(private, b"info", sealed, hybrid=True) == SECRET
    for key, info, hybrid in [
        (hpke.make_private(), b"info", True),
        (private, b"infp", True),
        (private, b"info", False),
    ]:
        with pytest.raises(hpke.OpenRefused) as raised:
            hpke.open_(key, info, sealed, hybrid=hybrid)
        assert raised.value.__context__ is None
    with pytest.raises(hpke.OpenRefused):
        hpke.open_(private, b"info", hpke.seal(hpke.public_of(private), b"info", SECRET), hybrid=True)


def test_a_message_with_one_half_of_the_hybrid_changed_does_not_open(private: bytearray) -> None:
    sealed = hpke.seal(hpke.hybrid_public_of(private), b"info", SECRET)
    other = hpke.seal(hpke.hybrid_public_of(private), b"info", SECRET)
    cut = 1088  # ML-KEM's ciphertext, then X25519's ephemeral key
    mixed = [other[:cut] + sealed[cut:], sealed[:cut] + other[cut : cut + 32] + sealed[cut + 32 :]]
    places = random.Random(5).sample(range(8 * len(sealed)), 200)
    mixed += [sealed[: b // 8] + bytes([sealed[b // 8] ^ 1 << b % 8]) + sealed[b // 8 + 1 :] for b in places]
    mixed += [sealed[:-1], sealed + b"\0", b"", sealed[: hpke.HYBRID_ENC_BYTES]]
    for each in mixed:
        with pytest.raises(hpke.OpenRefused):
            hpke.open_(private, b"info", each, hybrid=True)


@pytest.mark.parametrize("length", [0, 31, 33, 96])
def test_a_seed_of_another_length_and_a_hybrid_key_that_is_none_are_refused(length: int) -> None:
    with pytest.raises(hpke.PrivateKeyRefused):
        hpke.hybrid_public_of(bytearray(length))
    for public in (b"\xff" * hpke.HYBRID_PUBLIC_BYTES, bytes(hpke.HYBRID_PUBLIC_BYTES - 1)):
        with pytest.raises(hpke.PublicKeyRefused):
            hpke.seal(public, b"info", SECRET)
