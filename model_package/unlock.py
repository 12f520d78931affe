"""Unlocking by invocation: a key reaches a container that no network reaches, inside an ordinary call.

Owns: the container's description, the unlock message, both ends of the exchange.
Must not know: HTTP, endpoints, where a data key is kept.
Invariant: a message opens once, in the container and start it was sealed for, for the package it names; every
byte the other side sent is bounded before it is parsed.

    client                                       container
    describe                        ->
                                    <-           container_key, challenge, image_version, base
    seal(data key)  challenge, package, HPKE ->  open_message, which uses the challenge up

There is no attestation: that the description comes from the container is as sure as IAM and TLS to the
endpoint. An endpoint of several instances needs a session, so that both calls reach the same one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import OrderedDict
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from model_package import hpke
from model_package.manifest import Base, Hex64, Manifest
from model_package.recipients import DATA_KEY_BYTES, Hex32, KeyContext
from model_package.refusal import KeyRefused, Refusal
from model_package.secret import hold, wipe

MAX_DOCUMENT_BYTES: Final = 4096  # description and message alike take under 600
MAX_CHALLENGES: Final = 64  # outstanding at once; the oldest gives way, its client asks again
CHALLENGE_BYTES: Final = 16
INFO_LABEL: Final = b"strongroom/unlock/v1\0"

Version = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._+-]{1,64}\Z")]
Hex96 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{96}\Z")]  # a data key and its tag


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a container says of itself; `base` is the package it has opened or waits to open."""

    base: Base
    challenge: Hex32
    container_key: Hex64
    format: Literal[1]
    image_version: Version

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).digest()


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data key on its way; `package` is what it opens."""

    challenge: Hex32
    ciphertext: Hex96
    container_key: Hex64
    encapsulated: Hex64
    format: Literal[1]
    package: Base


_Document = TypeVar("_Document", Description, Message)
_DESCRIPTIONS: Final = msgspec.json.Decoder(Description)
_MESSAGES: Final = msgspec.json.Decoder(Message)


class Container:
    """The container's end: an ephemeral key that lives as long as this object and never leaves it."""

    def __init__(self, base: Base, image_version: str) -> None:
        self._private = hpke.make_private()
        hold(self._private)
        self._public = hpke.public_of(self._private)
        self._base = base
        self._image_version = image_version
        self._issued: OrderedDict[str, Description] = OrderedDict()

    def describe(self) -> bytes:
        """Return a description, JSON, good for one unlock message."""
        description = Description(
            base=self._base,
            challenge=os.urandom(CHALLENGE_BYTES).hex(),
            container_key=self._public.hex(),
            format=1,
            image_version=self._image_version,
        )
        self._issued[description.challenge] = description
        if len(self._issued) > MAX_CHALLENGES:
            self._issued.popitem(last=False)
        return msgspec.json.encode(description, order="sorted")

    def open_message(self, raw: bytes, manifest: Manifest) -> bytearray:
        """Return the data key in `raw` for the package of `manifest`, whose signature the caller has checked.

        The caller wipes it and holds it against the commitment. Raises KeyRefused with UNLOCK_*.
        """
        message = _parse(raw, _MESSAGES)
        if not hmac.compare_digest(message.container_key, self._public.hex()):
            raise KeyRefused(Refusal.UNLOCK_FOR_ANOTHER_CONTAINER)
        if message.package != manifest.as_base:
            raise KeyRefused(Refusal.UNLOCK_FOR_ANOTHER_PACKAGE)
        description = self._issued.get(message.challenge)
        if description is None:
            raise KeyRefused(Refusal.UNLOCK_REPLAYED)
        sealed = bytes.fromhex(message.encapsulated + message.ciphertext)
        data_key: bytearray | None
        try:
            data_key = hpke.open_(self._private, _info(description, manifest.key_context), sealed)
        except hpke.HpkeError:
            data_key = None
        if data_key is None:  # the challenge stays: a stranger's garbage must not use it up
            raise KeyRefused(Refusal.UNLOCK_WRONG)
        del self._issued[message.challenge]
        return data_key

    def close(self) -> None:
        """Wipe the ephemeral key; no message opens afterwards."""
        self._issued.clear()
        wipe(self._private)


def read_description(raw: bytes) -> Description:
    """Return what a container said of itself; it may be anybody's word. Raises KeyRefused."""
    return _parse(raw, _DESCRIPTIONS)


def seal(
    description: bytes, manifest: Manifest, data_key: bytearray, image_versions: frozenset[str]
) -> bytes:
    """Return the unlock message, JSON, that hands `data_key` for `manifest` to the described container.

    The client's end. An adapter's key goes to a container of the base it was made from, a base's to one that
    waits for it, and either to an image of `image_versions` alone. Raises KeyRefused with UNLOCK_MALFORMED,
    CONTAINER_UNEXPECTED or KEY_LENGTH_WRONG.
    """
    told = read_description(description)
    if told.base != (manifest.base or manifest.as_base) or told.image_version not in image_versions:
        raise KeyRefused(Refusal.CONTAINER_UNEXPECTED)
    if len(data_key) != DATA_KEY_BYTES:
        raise KeyRefused(Refusal.KEY_LENGTH_WRONG)
    sealed = b""
    try:
        sealed = hpke.seal(bytes.fromhex(told.container_key), _info(told, manifest.key_context), data_key)
    except hpke.HpkeError:
        sealed = b""
    if not sealed:
        raise KeyRefused(Refusal.UNLOCK_MALFORMED)
    message = Message(
        challenge=told.challenge,
        ciphertext=sealed[hpke.ENC_BYTES :].hex(),
        container_key=told.container_key,
        encapsulated=sealed[: hpke.ENC_BYTES].hex(),
        format=1,
        package=manifest.as_base,
    )
    return msgspec.json.encode(message, order="sorted")


def _info(description: Description, context: KeyContext) -> bytes:
    """Bind the sealed key to all the container said and to the package, its content and its owner."""
    return INFO_LABEL + description.digest + context.info()


def _parse(raw: bytes, decoder: msgspec.json.Decoder[_Document]) -> _Document:
    parsed: _Document | None = None
    if len(raw) <= MAX_DOCUMENT_BYTES:
        try:
            parsed = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            parsed = None  # raised below: the exception would hold content
    if parsed is None:
        raise KeyRefused(Refusal.UNLOCK_MALFORMED)
    return parsed
