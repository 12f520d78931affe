"""The data key of a package, from a key source named in a setting.

Owns: the whole list of key sources, and what each does for a given package.
Must not know: how a package is opened, AWS (a key service comes in as an argument), HTTP.
Invariant: parsing a source reads nothing; a data key that is returned is a new bytearray of 32 bytes, which
the caller wipes and holds against the commitment.

    file: fd: env: channel: image:    the data key itself: sources.py
    recipient:SOURCE                  SOURCE gives an X25519 private key, the manifest the wrapped data key
    licence:/PATH,SOURCE              SOURCE gives the installation's private key, the licence the wrapped one
    kms:ARN                           the manifest holds the data key as the service encrypted it
    invocation:                       the data key comes in a call: unlock.py
    attest:                           refused: a seam for attested release, which this version does not have
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from model_package import licence, recipients
from model_package.licence import Licensing
from model_package.manifest import Manifest
from model_package.recipients import DATA_KEY_BYTES, Scheme
from model_package.refusal import KeyRefused, Refusal
from model_package.secret import wipe, wiping
from model_package.sources import CHANNELS, Source, source
from model_package.unlock import Container

_ARN: Final = re.compile(r"arn:aws[a-z-]{0,16}:kms:[a-z0-9-]{1,32}:[0-9]{12}:key/[A-Za-z0-9-]{1,64}")
_LICENCE: Final = re.compile(r"(/[^,?\0]{1,4095}),(.+)")


class Decrypter(Protocol):
    """A key service. `infra.kms` has AWS's."""

    def decrypt(self, key_arn: str, ciphertext: bytes, context: Mapping[str, str]) -> bytearray:
        """Return what was encrypted under `key_arn` with `context`; the caller wipes it.

        Raises KeyRefused with SERVICE_REFUSED or SERVICE_UNREACHABLE.
        """


class Provider(Protocol):
    """Something that gives a package's data key."""

    @property
    def reusable(self) -> bool:
        """True if it can be asked again, as when an engine restarts."""

    @property
    def caution(self) -> str:
        """What the operator must be told at start; empty for nothing."""

    def data_key(self, manifest: Manifest) -> bytearray:
        """Return the data key of the package of `manifest`, whose signature the caller has checked.

        Raises KeyRefused, or PackageError with RECIPIENT_MISSING or RECIPIENT_WRONG.
        """


@dataclass(frozen=True, slots=True)
class Means:
    """What the process that asks can offer: the switches, services and call that some sources need."""

    environment: MutableMapping[str, str] = field(repr=False)
    development: bool = False
    channels: Path = CHANNELS
    decrypter: Decrypter | None = None
    licensing: Licensing | None = None
    container: Container | None = None
    unlock_message: bytes | None = field(default=None, repr=False)
    kept: Source | None = None  # what the named source gave, once, to whoever keeps it


@dataclass(frozen=True, slots=True)
class FromSource:
    """Base of those that a source of 32 bytes feeds: what holds of it holds of them."""

    source: Source

    @property
    def reusable(self) -> bool:
        return self.source.reusable

    @property
    def caution(self) -> str:
        return self.source.caution


@dataclass(frozen=True, slots=True)
class Given(FromSource):
    """The source holds the data key itself."""

    def data_key(self, _manifest: Manifest) -> bytearray:
        return self.source.read()


@dataclass(frozen=True, slots=True)
class Wrapped(FromSource):
    """The source holds a private key, and the manifest the data key wrapped for it."""

    def data_key(self, manifest: Manifest) -> bytearray:
        with wiping(self.source.read()) as private:
            return recipients.unwrap(manifest.recipients, private, manifest.key_context)


@dataclass(frozen=True, slots=True)
class Licensed(FromSource):
    """The source holds the installation's private key, and a licence the data key wrapped for it."""

    path: Path
    licensing: Licensing

    def data_key(self, manifest: Manifest) -> bytearray:
        held = licence.admit(self.path, self.licensing).licence
        with wiping(self.source.read()) as private:
            return licence.unwrap(held, manifest, private)


@dataclass(frozen=True, slots=True)
class Kms:
    """A key service holds the key that the data key was encrypted under."""

    arn: str
    decrypter: Decrypter
    reusable: bool = True
    caution: str = ""

    def data_key(self, manifest: Manifest) -> bytearray:
        entry = recipients.find(manifest.recipients, Scheme.KMS, self.arn.encode("ascii"))
        context = manifest.key_context.encryption_context()
        key = self.decrypter.decrypt(self.arn, bytes.fromhex(entry.ciphertext), context)
        if len(key) != DATA_KEY_BYTES:
            wipe(key)
            raise KeyRefused(Refusal.KEY_LENGTH_WRONG)
        return key


@dataclass(frozen=True, slots=True)
class Invoked:
    """The data key came, or has yet to come, in a call to this container."""

    container: Container
    message: bytes | None = field(repr=False)
    reusable: bool = False
    caution: str = ""

    def data_key(self, manifest: Manifest) -> bytearray:
        if self.message is None:
            raise KeyRefused(Refusal.UNLOCK_PENDING)
        return self.container.open_message(self.message, manifest)


def provider(uri: str, means: Means) -> Provider:
    """Return the provider that `uri` names. Raises KeyRefused with SOURCE_*; reads nothing."""
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "attest":
            raise KeyRefused(Refusal.SOURCE_NOT_BUILT)
        case "recipient":
            return Wrapped(_source(rest, means))
        case "licence" | "license":
            return _licensed(rest, means)
        case "kms":
            return _kms(rest, means)
        case "invocation":
            if rest or means.container is None:
                raise KeyRefused(Refusal.SOURCE_MALFORMED if rest else Refusal.SOURCE_WITHOUT_CALLS)
            return Invoked(means.container, means.unlock_message)
        case _:
            return Given(_source(uri, means))


def _licensed(rest: str, means: Means) -> Licensed:
    parts = _LICENCE.fullmatch(rest)
    if parts is None:
        raise KeyRefused(Refusal.SOURCE_MALFORMED)
    if means.licensing is None:
        raise KeyRefused(Refusal.SOURCE_WITHOUT_ROOTS)
    return Licensed(_source(parts[2], means), Path(parts[1]), means.licensing)


def _kms(arn: str, means: Means) -> Kms:
    if not _ARN.fullmatch(arn):
        raise KeyRefused(Refusal.SOURCE_MALFORMED)
    if means.decrypter is None:
        raise KeyRefused(Refusal.SOURCE_WITHOUT_SERVICE)
    return Kms(arn, means.decrypter)


def _source(uri: str, means: Means) -> Source:
    if means.kept is not None:
        return means.kept
    return source(uri, means.environment, development=means.development, channels=means.channels)
