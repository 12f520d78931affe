"""Where 32 secret bytes come from: a closed list of sources, each named by a URI in a setting.

Owns: the URI forms `file:`, `fd:`, `env:`, `channel:`, `image:` and reading them.
Must not know: packages, what the bytes open.
Invariant: parsing reads nothing; `read` gives a new bytearray that the caller wipes.

    file:/PATH             a file that only its owner may read; `?unlink` removes it once read
    fd:N                   an inherited descriptor, closed once read
    env:NAME               64 hex digits; development only: the environment block cannot be wiped
    channel:NAME           the file `key` of an artifact that the platform lays out beside the model
    image:/PATH,/PATH      the XOR of a share in the image and a share in the artifact: see SplitSource
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from model_package import key_files
from model_package.refusal import KeyRefused, Refusal
from model_package.secret import KEY_BYTES, wipe

CHANNELS: Final = Path("/opt/ml/additional-model-data-sources")  # SageMaker's AdditionalModelDataSources
CHANNEL_FILE: Final = "key"
UNLINK: Final = "?unlink"

_PATH: Final = re.compile(r"/(?!/)[^,?\0]{1,4095}")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_CHANNEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")  # ChannelName is 64 characters at most
_DESCRIPTOR: Final = re.compile(r"[1-9][0-9]{0,5}")
_STANDARD_STREAMS: Final = 3  # descriptors below it


class Source(Protocol):
    """Something that gives the 32 bytes."""

    @property
    def reusable(self) -> bool:
        """True if it can be read again, as when an engine restarts."""

    @property
    def caution(self) -> str:
        """What the operator must be told at start; empty for nothing."""

    def read(self) -> bytearray:
        """Return the bytes, which the caller wipes. Raises KeyRefused."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of mode 0400 or 0600, such as a mounted secret."""

    path: Path
    unlink: bool = False
    caution: str = ""

    @property
    def reusable(self) -> bool:
        return not self.unlink

    def read(self) -> bytearray:
        return key_files.read_file(self.path, unlink=self.unlink)


@dataclass(frozen=True, slots=True)
class ChannelSource:
    """A file that the platform fetched with the execution role and laid out read-only.

    Its mode is the platform's and not looked at; who may read it is who may read the bucket.
    """

    path: Path
    reusable: bool = True
    caution: str = ""

    def read(self) -> bytearray:
        return key_files.read_file(self.path, private=False)


@dataclass(slots=True)
class DescriptorSource:
    """An inherited descriptor: a pipe, a memfd, or a file opened before privileges were dropped."""

    descriptor: int
    reusable: bool = False
    caution: str = ""
    _used: bool = field(default=False, init=False)

    def read(self) -> bytearray:
        if self._used:  # by now the number may belong to something else
            raise KeyRefused(Refusal.SOURCE_USED_UP)
        self._used = True
        return key_files.read_descriptor(self.descriptor)


@dataclass(frozen=True, slots=True)
class EnvironmentSource:
    """A variable, for development: strings and the environment block keep copies that nothing can wipe."""

    name: str
    environment: MutableMapping[str, str] = field(repr=False)
    reusable: bool = False
    caution: str = "`env:` leaves the key in /proc/PID/environ until the process ends: for development only"

    def read(self) -> bytearray:
        text = self.environment.pop(self.name, None)
        if text is None:
            raise KeyRefused(Refusal.KEY_MISSING)
        encoded = bytearray(text, "utf-8", "replace")
        try:
            if len(encoded) == KEY_BYTES:  # a variable holds hex, never raw bytes
                raise KeyRefused(Refusal.KEY_LENGTH_WRONG)
            return key_files.decode(encoded)
        finally:
            wipe(encoded)


@dataclass(frozen=True, slots=True)
class SplitSource:
    """The XOR of a share in the image and a share in the artifact, which lie in two places of the platform.

    Obfuscation, no more: whoever holds both has the key. On AWS Marketplace buyers can read neither, by the
    platform's rules and not by cryptography.
    """

    image_share: Path
    artifact_share: Path
    reusable: bool = True
    caution: str = "`image:` is obfuscation: image and artifact together hold the whole key"

    def read(self) -> bytearray:
        key = key_files.read_file(self.image_share, private=False)
        other = bytearray(0)
        try:
            other = key_files.read_file(self.artifact_share, private=False)
            for place in range(KEY_BYTES):
                key[place] ^= other[place]
            if not any(key):
                raise KeyRefused(Refusal.SHARES_EQUAL)
        except KeyRefused:
            wipe(key)
            raise
        finally:
            wipe(other)
        return key


def split(key: bytearray) -> tuple[bytearray, bytearray]:
    """Return two shares whose XOR is `key`; each alone says nothing about it. The caller wipes them."""
    first = bytearray(os.urandom(len(key)))
    second = bytearray(one ^ other for one, other in zip(first, key, strict=True))
    return first, second


def inner(uri: str) -> str | None:
    """Return the part of a key source (providers.py) that this file reads; None where it reads nothing."""
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "attest" | "kms" | "invocation":
            return None
        case "recipient":
            return rest
        case "licence" | "license":
            return rest.partition(",")[2]
        case _:
            return uri


def source(
    uri: str, environment: MutableMapping[str, str], *, development: bool = False, channels: Path = CHANNELS
) -> Source:
    """Return the source that `uri` names. Raises KeyRefused with SOURCE_*; reads nothing.

    `development` allows `env:`.
    """
    scheme, colon, rest = uri.partition(":")
    if scheme == "env" and colon and not development:
        raise KeyRefused(Refusal.SOURCE_FOR_DEVELOPMENT)
    found: Source | None = None
    match scheme:
        case "file":
            path = rest.removesuffix(UNLINK)
            if _PATH.fullmatch(path):
                found = FileSource(Path(path), unlink=rest.endswith(UNLINK))
        case "fd":
            if _DESCRIPTOR.fullmatch(rest) and int(rest) >= _STANDARD_STREAMS:
                found = DescriptorSource(int(rest))
        case "env":
            if _NAME.fullmatch(rest):
                found = EnvironmentSource(rest, environment)
        case "channel":
            if _CHANNEL.fullmatch(rest):
                found = ChannelSource(channels / rest / CHANNEL_FILE)
        case "image":
            shares = rest.split(",")
            if len(shares) == 2 and all(_PATH.fullmatch(share) for share in shares):
                found = SplitSource(Path(shares[0]), Path(shares[1]))
        case _:
            raise KeyRefused(Refusal.SOURCE_UNKNOWN)
    if found is None:
        raise KeyRefused(Refusal.SOURCE_MALFORMED)
    return found
