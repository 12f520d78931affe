"""What a licence looks like: one line that says who signed, one line of canonical JSON.

Owns: fields, bounds, the text form, signing and checking it.
Must not know: what time it is, private keys of installations.
Invariant: nothing of the JSON is parsed before its signature holds; a licence that was parsed encodes to the
very bytes it was parsed from.

    strongroom licence 1 <signer id, 32 hex> <signature, 128 hex>
    {"keys":[...],"terms":{...}}

The signer id is FORMAT.md 3's, the JSON's rules are FORMAT.md 4.1's; both lines end in one line feed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec

from model_package import signing_keys
from model_package.manifest import Hex64, ModelWord, Plain, Revision, Seconds
from model_package.recipients import Hex32
from model_package.refusal import KeyRefused, Refusal
from model_package.signature import Root

MAX_LICENCE_BYTES: Final = 512 * 1024  # 1,024 keys of 300 bytes, and the terms
MAX_KEYS: Final = 1024
MAX_PACKAGES: Final = 64
MAX_FEATURES: Final = 64
PURPOSE: Final = b"strongroom/licence/v1/document"
TERMS_LABEL: Final = b"strongroom/licence/v1/terms\0"

Hex96 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{96}\Z")]
Party = Annotated[Plain, msgspec.Meta(min_length=1, max_length=200)]
Feature = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9._-]{1,64}\Z")]

_HEAD: Final = re.compile(rb"strongroom licence 1 ([0-9a-f]{32}) ([0-9a-f]{128})")


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was agreed; the wrapped keys are bound to every field of it."""

    customer: Party
    epoch_min: Revision
    features: Annotated[tuple[Feature, ...], msgspec.Meta(max_length=MAX_FEATURES)]
    format: Literal[1]
    id: ModelWord
    not_after_s: Seconds
    not_before_s: Seconds
    package_ids: Annotated[tuple[Hex32, ...], msgspec.Meta(min_length=1, max_length=MAX_PACKAGES)]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the terms: what a wrapped key is bound to."""
        return hashlib.sha256(TERMS_LABEL + msgspec.json.encode(self, order="sorted")).digest()


class WrappedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One package's data key, wrapped for one installation."""

    ciphertext: Hex96
    encapsulated: Hex64
    key_id: Hex32  # of the installation's public key: FORMAT.md 7.1
    package_id: Hex32


class Licence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A licence whose signature holds, or one that is about to be signed."""

    keys: Annotated[tuple[WrappedKey, ...], msgspec.Meta(max_length=MAX_KEYS)]
    terms: Terms


_DECODER: Final = msgspec.json.Decoder(Licence)


def sign(licence: Licence, private: bytearray) -> bytes:
    """Return the licence's file, signed with the vendor's Ed25519 key.

    Raises KeyRefused, SigningKeyRefused.
    """
    body = msgspec.json.encode(licence, order="sorted")
    parse(body)  # what is signed can be read
    public = signing_keys.public_of(private)
    signature = signing_keys.sign(private, PURPOSE, body)
    head = f"strongroom licence 1 {signing_keys.key_id(public).hex()} {signature.hex()}"
    return head.encode("ascii") + b"\n" + body + b"\n"


def verify(raw: bytes, roots: Sequence[Root], now_s: int) -> Licence:
    """Return the licence in the file `raw`, signed under one of the vendor's `roots`.

    Raises KeyRefused with LICENCE_OVERSIZED, LICENCE_MALFORMED, LICENCE_SIGNER_UNKNOWN,
    LICENCE_SIGNER_EXPIRED or LICENCE_CHANGED.
    """
    if len(raw) > MAX_LICENCE_BYTES:
        raise KeyRefused(Refusal.LICENCE_OVERSIZED)
    head, _, rest = raw.partition(b"\n")
    named = _HEAD.fullmatch(head)
    if named is None or not rest.endswith(b"\n"):
        raise KeyRefused(Refusal.LICENCE_MALFORMED)
    signer_id, signature = bytes.fromhex(named[1].decode()), bytes.fromhex(named[2].decode())
    root = next((root for root in roots if root.signer_id == signer_id), None)
    if root is None:
        raise KeyRefused(Refusal.LICENCE_SIGNER_UNKNOWN)
    if root.not_after_s is not None and now_s > root.not_after_s:
        raise KeyRefused(Refusal.LICENCE_SIGNER_EXPIRED)
    body = rest[:-1]
    try:
        signing_keys.verify(root.public_key, PURPOSE, body, signature)
        holds = True
    except signing_keys.SigningKeyError:
        holds = False
    if not holds:
        raise KeyRefused(Refusal.LICENCE_CHANGED)
    return parse(body)


def parse(body: bytes) -> Licence:
    """Return the licence in `body`, whose signature the caller has checked.

    Raises KeyRefused with LICENCE_MALFORMED.
    """
    licence: Licence | None
    try:
        licence = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        licence = None  # raised below: the exception would hold content
    if licence is None or msgspec.json.encode(licence, order="sorted") != body or not _ordered(licence):
        raise KeyRefused(Refusal.LICENCE_MALFORMED)
    return licence


def _ordered(licence: Licence) -> bool:
    """True when lists are sorted without repetition, dates in order, and keys of named packages."""
    terms, places = licence.terms, [(key.package_id, key.key_id) for key in licence.keys]
    return (
        list(terms.features) == sorted(set(terms.features))
        and list(terms.package_ids) == sorted(set(terms.package_ids))
        and places == sorted(set(places))
        and {package for package, _ in places} <= set(terms.package_ids)
        and terms.not_before_s < terms.not_after_s
    )
