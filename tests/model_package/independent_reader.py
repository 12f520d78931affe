"""A reader of sealed packages written from FORMAT.md alone: standard library and cryptography only.

Owns: nothing but the claim that the document suffices. Must not know: model_package.
Invariant: `read` returns exactly one outcome of FORMAT.md 9, and content only with `opened`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Stop, unhex = type("Stop", (Exception,), {}), bytes.fromhex  # the exception carries the outcome
P, BAD, TOC = b"strongroom/package/v1/", "manifest-malformed", "toc-malformed"
ID, SHA, PAIRS, WORD = "[0-9a-f]{32}", "[0-9a-f]{64}", "([0-9a-f]{2})*", "[A-Za-z0-9._-]{1,100}"
ODD, PART = re.compile(r"[/\x00-\x1f\x7f]|\.\."), "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
# fmt: off
ENTRY = {"file_id": ID, "index_sha256": SHA, "kind": "tensors|blob", "name": "[ !#-\\[\\]-~]*",
         "sha256": SHA, "size": (64, 2**38)}
WRAPPED = {"x25519": (32, 48, 48), "mlkem768x25519": (1120, 48, 48), "kms": (0, 1, 6144)}
RECIPIENT = {"ciphertext": PAIRS, "encapsulated": PAIRS, "key_id": ID, "scheme": "|".join(WRAPPED)}
FIELDS = {"base": ({"content_sha256": SHA, "package_id": ID}, None), "commitment": SHA, "package_id": ID,
          "created_s": (0, 2**50), "epoch": (0, 2**31 - 1), "files": [ENTRY, 1, 4096], "format": (0, 2**50),
          "min_loader": (0, 2**31 - 1), "model": {"name": WORD, "version": WORD}, "owner": "vendor|customer",
          "recipients": [RECIPIENT, 0, 64]}
BITS = {name: int(bits) for bits, names in {
    "4": "F4", "6": "F6_E2M3 F6_E3M2", "8": "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    "16": "I16 U16 F16 BF16", "32": "I32 U32 F32", "64": "F64 I64 U64 C64"}.items() for name in names.split()}
# fmt: on


def need(holds: object, outcome: str) -> None:
    if not holds:
        raise Stop(outcome)


@contextmanager
def becoming(outcome: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors:
        raise Stop(outcome) from None


def read(directory: Path, given: Any) -> tuple[str, dict[str, bytes]]:
    """Return the outcome and the unsealed files; `given` is what a reader knows: see vector_file.py."""
    try:
        raw = slurp(directory / "manifest.json", "manifest-missing")
        need(2 <= len(raw) <= 4 * 2**20, "manifest-oversized")
        check_signature(slurp(directory / "manifest.sig", "signature-missing"), raw, given)
        manifest = parse_manifest(raw)
        base = manifest["base"] and (manifest["base"]["package_id"], manifest["base"]["content_sha256"])
        need(manifest["format"] == 1, "format-unsupported")
        need(manifest["min_loader"] <= 1, "loader-too-old")
        need(manifest["owner"] == given.owner, "owner-wrong")
        need(manifest["epoch"] >= given.min_epoch, "epoch-too-old")
        need(manifest["created_s"] <= given.now_s + 3600, "clock-behind")
        need(base == given.base, "base-wrong")
        package_id = unhex(manifest["package_id"])
        files = [(entry["name"], *check_file(directory, entry, package_id)) for entry in manifest["files"]]
        key = given.data_key if given.recipient_key is None else unwrap(manifest, given.recipient_key)
        need(len(key) == 32, "key-wrong")
        need(derive(key, package_id, b"commitment\0").hex() == manifest["commitment"], "key-wrong")
        return "opened", {name: open_file(raw, file_id, key, package_id) for name, raw, file_id in files}
    except Stop as stop:
        return str(stop), {}


def slurp(path: Path, missing: str) -> bytes:
    need(os.path.lexists(path), missing)
    need(path.is_file() and not path.is_symlink(), "not-a-regular-file")
    return path.read_bytes()


def short_id(label: bytes, key: bytes) -> bytes:
    return hashlib.sha256(P + label + b"\0" + key).digest()[:16]


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, P + info).derive(key)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def check_signature(sig: bytes, raw: bytes, given: Any) -> None:
    need(len(sig) == 88 and sig[:8] == b"SLDSIG\x01\x00", "signature-malformed")
    named = {of: (unhex(k), end) for of, k, end in given.roots if short_id(b"signer", unhex(k)) == sig[8:24]}
    need(named, "signer-unknown")
    need(given.owner in named, "signer-of-other-party")
    public, until = named[given.owner]
    need(until is None or given.now_s <= until, "signer-expired")
    with becoming("signature-wrong", InvalidSignature):
        Ed25519PublicKey.from_public_bytes(public).verify(sig[24:], P + b"manifest\0" + raw)


def fits(value: Any, rule: Any) -> bool:
    """True when `value` follows: pattern, (least, most), [of each, fewest, most], fields, (rule, None)."""
    if isinstance(rule, str):
        return isinstance(value, str) and re.fullmatch(rule, value) is not None
    if isinstance(rule, list):
        counted = isinstance(value, list) and rule[1] <= len(value) <= rule[2]
        return counted and all(fits(each, rule[0]) for each in value)
    if isinstance(rule, dict):
        same = isinstance(value, dict) and set(value) == set(rule)
        return same and all(fits(value[name], rule[name]) for name in rule)
    if rule[1] is None:
        return value is None or fits(value, rule[0])
    return type(value) is int and rule[0] <= value <= rule[1]


def parse_manifest(raw: bytes) -> Any:
    with becoming(BAD, ValueError, RecursionError):
        manifest = json.loads(raw)
        need(canonical(manifest) == raw and fits(manifest, FIELDS), BAD)
    files, recipients = manifest["files"], manifest["recipients"]
    names = [entry["name"] for entry in files]
    places = [(entry["scheme"], entry["key_id"]) for entry in recipients]
    need(names == sorted(names) and len({entry["file_id"] for entry in files}) == len(files), BAD)
    need(places == sorted(set(places)), BAD)
    for entry in recipients:
        size, least, most = (2 * length for length in WRAPPED[entry["scheme"]])
        need(len(entry["encapsulated"]) == size and least <= len(entry["ciphertext"]) <= most, BAD)
    lowered = {name.lower() for name in names}
    need(len(lowered) == len(names), "name-refused")
    for name in names:
        folders = {name[: at.start()].lower() for at in re.finditer("/", name)}
        plain = len(name) <= 200 and re.fullmatch(f"{PART}(/{PART}){{0,3}}", name)
        need(plain and "./" not in name + "/" and not folders & lowered, "name-refused")
    return manifest


def check_file(directory: Path, entry: Any, package_id: bytes) -> tuple[bytes, bytes]:
    raw = slurp(directory / f"{entry['file_id']}.sealed", "file-missing")
    need(len(raw) == entry["size"], "size-wrong")
    need(raw[:5] == b"SLDWT" and len(raw) >= 64, "not-sealed")
    need(raw[5] == 1, "format-unsupported")
    need(raw[6] == 1, "suite-unsupported")
    need(raw[7] in (12, 20), "chunk-size-unsupported")
    file_id, package, segments, chunks, toc, kind = struct.unpack("<16s16sIIQB", raw[8:57])
    counts = 1 <= segments <= 100_001 and segments <= chunks <= 524_288 and 64 + 48 * chunks + toc <= len(raw)
    kinds = (kind == 1 and 2 <= toc <= 2**24) or (kind, toc, segments) == (2, 0, 2)
    need(counts and kinds and raw[57:64] == bytes(7), "header-out-of-bounds")
    ids = (unhex(entry["file_id"]), package_id, {"tensors": 1, "blob": 2}[entry["kind"]])
    need((file_id, package, kind) == ids, "header-mismatch")
    need(hashlib.sha256(raw[: 64 + 32 * chunks]).hexdigest() == entry["index_sha256"], "index-wrong")
    return raw, file_id


def unwrap(manifest: Any, private: bytes) -> bytes:
    alone, seed = X25519PrivateKey.from_private_bytes(private), hashlib.shake_256(private).digest(96)
    both = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
    keys: Any = {b"x25519": (KEM.X25519, alone, [alone])}
    keys[b"mlkem768x25519"] = KEM.MLKEM768_X25519, MLKEM768X25519PrivateKey(*both), both
    found = []
    for scheme, (kem, key, halves) in keys.items():
        public = b"".join(half.public_key().public_bytes_raw() for half in halves)
        mine = (scheme.decode(), short_id(b"recipient-key\0" + scheme, public).hex())
        found += [(e, kem, key) for e in manifest["recipients"] if (e["scheme"], e["key_id"]) == mine]
    need(found, "recipient-missing")
    (entry, kem, key), *_ = found
    content = canonical({name: manifest[name] for name in ("commitment", "files", "owner", "package_id")})
    context = unhex(manifest["package_id"]) + hashlib.sha256(P + b"content\0" + content).digest()
    info = P + b"recipient\0" + context + (b"\1" if manifest["owner"] == "vendor" else b"\2")
    with becoming("recipient-wrong", InvalidTag, ValueError):
        wrapped = unhex(entry["encapsulated"] + entry["ciphertext"])
        return Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM).decrypt(wrapped, key, info)


def open_file(raw: bytes, file_id: bytes, key: bytes, package_id: bytes) -> bytes:
    log2, chunks, toc_length, kind = raw[7], *struct.unpack("<IQB", raw[44:57])
    cipher, size = AESGCM(derive(key, file_id, b"file\0" + package_id)), 1 << log2
    place, number = 64 + 32 * chunks, 0  # of the next chunk: where it lies, which it is

    def segment(which: int, length: int) -> bytes:
        nonlocal place, number
        out, count = b"", max(1, -(-length // size))
        for n in range(count):
            end = place + min(size, length - n * size) + 16
            index = raw[64 + 32 * number : 96 + 32 * number]
            need(hashlib.sha256(raw[place:end]).digest() == index, "chunk-wrong")
            bound = P + b"chunk\0" + raw[:64] + struct.pack("<IQQB", which, n, length, n == count - 1)
            with becoming("chunk-wrong", InvalidTag):
                out += cipher.decrypt(struct.pack("<IQ", which, n), raw[place:end], bound)
            place, number = end, number + 1
        return out

    toc = segment(0, toc_length)
    lengths = parse_toc(toc, raw) if kind == 1 else [len(raw) - 64 - 48 * chunks]
    total = sum(max(1, -(-length // size)) for length in lengths) + number
    need(total == chunks and 64 + 48 * chunks + toc_length + sum(lengths) == len(raw), "geometry-wrong")
    data = b"".join(segment(which, length) for which, length in enumerate(lengths, 1))
    return len(toc).to_bytes(8, "little") + toc + data if kind == 1 else data


def parse_toc(toc: bytes, raw: bytes) -> list[int]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), TOC)
        return dict(pairs)

    with becoming(TOC, ValueError, TypeError, AttributeError, RecursionError):
        text = toc.decode().rstrip(" ")
        need(text[:1] == "{" and text[-1:] == "}", TOC)
        table = json.loads(text, object_pairs_hook=unique)
        metadata = table.pop("__metadata__", {})
        need(len(metadata) <= 1024 and all(type(text) is str for text in metadata.values()), TOC)
        need(len(table) + 1 == int.from_bytes(raw[40:44], "little"), TOC)
        found = []
        for name, entry in table.items():
            need(1 <= len(name.encode()) <= 512 and not ODD.search(name), TOC)
            need(set(entry) == {"dtype", "shape", "data_offsets"} and entry["dtype"] in BITS, TOC)
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            need(fits(shape, [(0, 2**40), 0, 16]) and fits([begin, end], [(0, 2**62), 2, 2]), TOC)
            need(begin <= end and prod(n or 1 for n in shape) <= 2**48, TOC)
            need(prod(shape) * BITS[entry["dtype"]] == 8 * (end - begin), TOC)
            found.append((begin, end, name.encode()))
    found.sort()
    need([begin for begin, *_ in found] == [0, *(end for _, end, _ in found)][: len(found)], TOC)
    return [end - begin for begin, end, _ in found]
