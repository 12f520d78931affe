"""Packages made by hand from FORMAT.md, so that any one thing in them can be wrong.

Owns: laying out, encrypting, indexing and signing bytes as told, without asking whether they make sense.
Must not know: model_package.
Invariant: everything follows from its arguments; with none wrong the package opens.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

PREFIX = b"strongroom/package/v1/"
CHUNK = 4096
Files = dict[str, bytes]
Json = dict[str, Any]


def secret(name: str) -> bytes:
    """Return the 32 bytes of the published test key called `name`."""
    return hashlib.sha256(b"a key for tests: " + name.encode()).digest()


def ident(name: str) -> bytes:
    return hashlib.sha256(b"an id for tests: " + name.encode()).digest()[:16]


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, PREFIX + info).derive(key)


def public_of(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@dataclass
class Forged:
    """One sealed file to be. `segments` are plain, the table of contents first."""

    name: str
    segments: list[bytes]
    kind: str = "tensors"
    label: str = ""  # of its ids and key, when several files have one name
    header: Json = field(default_factory=dict)  # fields of 5.2 to be wrong, before anything is encrypted
    chunks: Callable[[list[bytes]], list[bytes]] = lambda chunks: (
        chunks
    )  # sealed ones, before they are indexed
    lengths: dict[int, int] = field(default_factory=dict)  # a segment's length as the associated data has it
    entry: Json = field(default_factory=dict)  # fields of the manifest's entry to be wrong
    data_key: bytes = secret("data")

    @property
    def file_id(self) -> bytes:
        return ident(self.label or self.name)


def pack_header(fields: Json) -> bytes:
    return struct.pack(
        "<6sBB16s16sIIQB7s",
        fields["magic"],
        fields["suite"],
        fields["log2_chunk"],
        fields["file_id"],
        fields["package_id"],
        fields["segments"],
        fields["chunks"],
        fields["toc_length"],
        fields["kind"],
        fields["reserved"],
    )


def cut(segment: bytes) -> list[bytes]:
    return [segment[place : place + CHUNK] for place in range(0, len(segment), CHUNK)] or [b""]


def sealed(forged: Forged, package_id: bytes) -> bytes:
    """Return the bytes of a sealed file: FORMAT.md 5."""
    fields = {
        "magic": b"SLDWT\x01",
        "suite": 1,
        "log2_chunk": 12,
        "file_id": forged.file_id,
        "package_id": package_id,
        "segments": len(forged.segments),
        "chunks": sum(len(cut(segment)) for segment in forged.segments),
        "toc_length": len(forged.segments[0]),
        "kind": {"tensors": 1, "blob": 2}[forged.kind],
        "reserved": bytes(7),
    }
    header = pack_header(fields | forged.header)
    cipher = AESGCM(derive(forged.data_key, forged.file_id, b"file\0" + package_id))
    chunks = []
    for number, segment in enumerate(forged.segments):
        parts = cut(segment)
        for place, part in enumerate(parts):
            length = forged.lengths.get(number, len(segment))
            bound = struct.pack("<IQQB", number, place, length, place == len(parts) - 1)
            nonce = struct.pack("<IQ", number, place)
            chunks.append(cipher.encrypt(nonce, part, PREFIX + b"chunk\0" + header + bound))
    chunks = forged.chunks(chunks)
    index = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    return header + index + b"".join(chunks)


def entry_of(forged: Forged, content: bytes) -> Json:
    chunks = int.from_bytes(content[44:48], "little")
    return {
        "file_id": forged.file_id.hex(),
        "index_sha256": hashlib.sha256(content[: 64 + 32 * chunks]).hexdigest(),
        "kind": forged.kind,
        "name": forged.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    } | forged.entry


def content_sha256(manifest: Json) -> str:
    content = {name: manifest[name] for name in ("commitment", "files", "owner", "package_id")}
    return hashlib.sha256(PREFIX + b"content\0" + canonical(content)).hexdigest()


@dataclass
class Package:
    """A package to be. `fields` go into the manifest as they are; `edit` has the last word before signing."""

    forged: list[Forged]
    name: str = "package"
    owner: str = "vendor"
    data_key: bytes = secret("data")
    fields: Json = field(default_factory=dict)
    edit: Callable[[Json], Json] = lambda manifest: manifest
    encode: Callable[[Json], bytes] = canonical
    signer: bytes = b""  # the owner's, unless given
    recipients: list[str] = field(default_factory=list)  # names of X25519 keys

    @property
    def package_id(self) -> bytes:
        return ident(self.name)

    def manifest(self) -> tuple[Json, Files]:
        files = {f"{each.file_id.hex()}.sealed": sealed(each, self.package_id) for each in self.forged}
        manifest: Json = {
            "base": None,
            "commitment": derive(self.data_key, self.package_id, b"commitment\0").hex(),
            "created_s": 1_790_000_000,
            "epoch": 5,
            "files": [entry_of(each, files[f"{each.file_id.hex()}.sealed"]) for each in self.forged],
            "format": 1,
            "min_loader": 1,
            "model": {"name": "tiny", "version": "1.0"},
            "owner": self.owner,
            "package_id": self.package_id.hex(),
            "recipients": [],
        } | self.fields
        manifest["recipients"] = sorted(
            (wrap(name, manifest, self.data_key) for name in self.recipients), key=lambda each: each["key_id"]
        )
        return self.edit(manifest), files

    def files(self) -> Files:
        manifest, files = self.manifest()
        raw = self.encode(manifest)
        return files | {"manifest.json": raw, "manifest.sig": sign(raw, self.signer or secret(self.owner))}


def sign(raw: bytes, private: bytes) -> bytes:
    signer_id = hashlib.sha256(PREFIX + b"signer\0" + public_of(private)).digest()[:16]
    return (
        b"SLDSIG\x01\x00"
        + signer_id
        + Ed25519PrivateKey.from_private_bytes(private).sign(PREFIX + b"manifest\0" + raw)
    )


def wrap(name: str, manifest: Json, data_key: bytes) -> Json:
    """Return the entry for the X25519 key called `name`; the ephemeral key follows from the names."""
    public = X25519PrivateKey.from_private_bytes(secret(name)).public_key().public_bytes_raw()
    owner = {"vendor": 1, "customer": 2}[manifest["owner"]]
    context = bytes.fromhex(manifest["package_id"] + content_sha256(manifest)) + bytes([owner])
    ephemeral = secret(f"ephemeral for {name}")
    encapsulated, ciphertext = hpke_seal(public, ephemeral, PREFIX + b"recipient\0" + context, data_key)
    return {
        "ciphertext": ciphertext.hex(),
        "encapsulated": encapsulated.hex(),
        "key_id": hashlib.sha256(PREFIX + b"recipient-key\0x25519\0" + public).digest()[:16].hex(),
        "scheme": "x25519",
    }


def hpke_seal(public: bytes, ephemeral: bytes, info: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
    """Return (encapsulated, ciphertext) of HPKE's base mode, RFC 9180, with the ephemeral key given."""
    private = X25519PrivateKey.from_private_bytes(ephemeral)
    encapsulated = private.public_key().public_bytes_raw()
    kem = b"KEM\x00\x20"
    suite = b"HPKE\x00\x20\x00\x01\x00\x02"

    def extract(salt: bytes, suite_id: bytes, label: bytes, key: bytes) -> bytes:
        mac = HMAC(salt or bytes(32), SHA256())
        mac.update(b"HPKE-v1" + suite_id + label + key)
        return mac.finalize()

    def expand(key: bytes, suite_id: bytes, label: bytes, context: bytes, length: int) -> bytes:
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + context
        return HKDFExpand(SHA256(), length, labelled).derive(key)

    shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    secret_ = expand(extract(b"", kem, b"eae_prk", shared), kem, b"shared_secret", encapsulated + public, 32)
    context = b"\0" + extract(b"", suite, b"psk_id_hash", b"") + extract(b"", suite, b"info_hash", info)
    scheduled = extract(secret_, suite, b"secret", b"")
    key = expand(scheduled, suite, b"key", context, 32)
    nonce = expand(scheduled, suite, b"base_nonce", context, 12)
    return encapsulated, AESGCM(key).encrypt(nonce, plaintext, b"")
