"""An OpenSSF model-signing bundle (`model.oms.sig`): digests of a folder's files, signed with ECDSA P-256.

Owns: writing and checking that form, its keys. Must not know: packages, what the files are.
Invariant: nothing of a statement is believed before its signature holds; only SHA-256, P-256 and whole files.

A second signature for those who check models of many makers with that project's tool; a loader reads
`manifest.sig` alone. DSSE (protocol.md of secure-systems-lab/dsse, v1.0.0) around an in-toto statement v1:

    {"mediaType": ..., "verificationMaterial": {"publicKey": {"hint": SHA-256 of the PEM}, "tlogEntries": []},
     "dsseEnvelope": {"payload": base64, "payloadType": ..., "signatures": [{"sig": base64, "keyid": ""}]}}
    payload: {"_type", "subject": [{"name", "digest": {"sha256": of all digests}}], "predicateType",
              "predicate": {"serialization": {...}, "resources": [{"name", "algorithm", "digest"}, by name]}}
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from model_package.secret import KEY_BYTES
from model_package.worded import WordedError

NAME: Final = "model.oms.sig"
BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
MAX_BUNDLE_BYTES: Final = 8 * 1024 * 1024  # 4,096 files take about 1 MB, in base64 a third more

T = TypeVar("T")
Digests = Mapping[str, str]  # name -> SHA-256, hex


class OmsError(WordedError):
    """Base of what this file raises.

    OmsError
    |- OmsKeyRefused        not a P-256 key
    |- OmsMalformed         not a bundle of the one supported form
    |- OmsSignatureRefused  another key, or changed bytes
    |- OmsFilesDiffer       the signature holds, and the folder holds other files
    """


class OmsKeyRefused(OmsError):
    message = "the key is not a usable P-256 key"
    hint = "make one with `strongroom key make --kind oms`"


class OmsMalformed(OmsError):
    message = "the model-signing bundle is not of the form that is supported"
    hint = "it must be signed with a P-256 key over SHA-256 digests of whole files"


class OmsSignatureRefused(OmsError):
    message = "the model-signing bundle's signature does not hold"
    hint = "it was made by another key, or was corrupted or tampered with"


class OmsFilesDiffer(OmsError):
    message = "the folder's files are not those of the model-signing bundle"
    hint = "fetch the folder again"


class _PublicKey(msgspec.Struct):
    hint: str | None = None


class _Material(msgspec.Struct, rename="camel"):
    public_key: _PublicKey


class _Signature(msgspec.Struct):
    sig: str


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: str
    signatures: tuple[_Signature, ...]


class _Bundle(msgspec.Struct, rename="camel"):
    """What is read of a bundle; what else the project's tool may write says nothing here."""

    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: tuple[_Resource, ...]


class _Subject(msgspec.Struct):
    digest: dict[str, str]


class _Statement(msgspec.Struct, rename={"type": "_type", "predicate_type": "predicateType"}):
    type: str
    subject: tuple[_Subject, ...]
    predicate_type: str
    predicate: _Predicate


def make_private() -> bytearray:
    """Return a fresh P-256 private key, its scalar in 32 bytes; the caller wipes it."""
    scalar = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value
    return bytearray(scalar.to_bytes(KEY_BYTES))


def public_pem(private: bytearray) -> bytes:
    """Return the public half as PEM, the form that the project's tool takes. Raises OmsKeyRefused."""
    return _pem(_private_key(private).public_key())


def sign(private: bytearray, model: str, files: Digests) -> bytes:
    """Return the bundle of `files` for the model named `model`; the same input gives the same bytes.

    Raises OmsKeyRefused.
    """
    key = _private_key(private)
    resources = [{"algorithm": "sha256", "digest": files[name], "name": name} for name in sorted(files)]
    serialized = {"allow_symlinks": False, "hash_type": "sha256", "ignore_paths": [NAME], "method": "files"}
    payload = _json(
        {
            "_type": STATEMENT_TYPE,
            "predicate": {"resources": resources, "serialization": serialized},
            "predicateType": PREDICATE_TYPE,
            "subject": [{"digest": {"sha256": _root(files[name] for name in sorted(files))}, "name": model}],
        }
    )
    signature = key.sign(_encoded(payload), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    hint = hashlib.sha256(_pem(key.public_key())).hexdigest()
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    material = {"publicKey": {"hint": hint}, "tlogEntries": []}
    return _json({"dsseEnvelope": envelope, "mediaType": BUNDLE_TYPE, "verificationMaterial": material})


def verify(bundle: bytes, pem: bytes) -> dict[str, str]:
    """Return the digests that the holder of the public key `pem` signed, by name. Raises OmsError."""
    key = _public_key(pem)
    found = _decoded(bundle, _Bundle) if len(bundle) <= MAX_BUNDLE_BYTES else None
    if found is None or found.media_type != BUNDLE_TYPE or found.dsse_envelope.payload_type != PAYLOAD_TYPE:
        raise OmsMalformed
    hint = found.verification_material.public_key.hint
    if len(found.dsse_envelope.signatures) != 1:
        raise OmsMalformed
    payload = _unarmoured(found.dsse_envelope.payload)
    signature = _unarmoured(found.dsse_envelope.signatures[0].sig)
    if hint not in (None, hashlib.sha256(_pem(key)).hexdigest()):
        raise OmsSignatureRefused
    try:
        key.verify(signature, _encoded(payload), ec.ECDSA(hashes.SHA256()))
        holds = True
    except InvalidSignature:
        holds = False
    if not holds:
        raise OmsSignatureRefused
    return _files(payload)


def check(directory: Path, bundle: bytes, pem: bytes, left_out: Collection[str] = (NAME,)) -> None:
    """Return if `directory` holds the files that were signed and no other. Raises OmsError, OSError.

    `left_out` names files that are not looked at. A link is no file here: its target can change.
    """
    signed = verify(bundle, pem)
    present = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            raise OmsFilesDiffer
        if path.is_file() and name not in left_out:
            with path.open("rb") as file:
                present[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if present != signed:
        raise OmsFilesDiffer


def _files(payload: bytes) -> dict[str, str]:
    """Return the digests in a statement whose signature holds. Raises OmsMalformed."""
    statement = _decoded(payload, _Statement)
    if statement is None or (statement.type, statement.predicate_type) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise OmsMalformed
    predicate, resources = statement.predicate, statement.predicate.resources
    files = {each.name: each.digest for each in resources}
    whole = (predicate.serialization.method, predicate.serialization.hash_type) == ("files", "sha256")
    alike = all(each.algorithm == "sha256" for each in resources) and len(files) == len(resources)
    subject = [{"sha256": _root(each.digest for each in resources)}] if whole and alike else None
    if subject is None or [each.digest for each in statement.subject] != subject:
        raise OmsMalformed
    return files


def _root(digests: Iterator[str]) -> str:
    """Return the SHA-256 over all digests in their order. Raises OmsMalformed."""
    digest = hashlib.sha256()
    for each in digests:
        try:
            raw = bytes.fromhex(each)
        except ValueError:
            raise OmsMalformed from None
        digest.update(raw)
    return digest.hexdigest()


def _encoded(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding, which is what is signed."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _decoded(raw: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _unarmoured(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise OmsMalformed from None


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def _private_key(private: bytearray) -> ec.EllipticCurvePrivateKey:
    key: ec.EllipticCurvePrivateKey | None = None
    if len(private) == KEY_BYTES:
        try:
            key = ec.derive_private_key(int.from_bytes(private), ec.SECP256R1())
        except ValueError:  # zero, or not below the group's order
            key = None
    if key is None:  # outside the handler, whose frames hold the scalar
        raise OmsKeyRefused
    return key


def _public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise OmsKeyRefused from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise OmsKeyRefused
    return key
