"""A licence in use: may this installation start, for how long, and with which data key.

Owns: dates and grace, wrapping and unwrapping a data key under the terms.
Must not know: the text form's details, the package's files.
Invariant: a data key comes out only for the package, the installation and the very terms it was wrapped
under: whoever edits a date, even the holder of a trusted signing key, has no key.

    read -> dates (admit)  ->  package, epoch, installation, terms (unwrap)  ->  data key

Expiry is judged when a container starts and never while it serves. On a host whose root sets the clock it is
a contract, not cryptography.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model_package import clock, hpke
from model_package.licence_form import MAX_LICENCE_BYTES, Licence, Terms, WrappedKey, verify
from model_package.manifest import Manifest
from model_package.recipients import Owner, Scheme, key_id
from model_package.refusal import KeyRefused, Refusal
from model_package.signature import Root

GRACE_DAYS: Final = 7
DAY_S: Final = 86_400
INFO_LABEL: Final = b"strongroom/licence/v1/key\0"


@dataclass(frozen=True, slots=True)
class Licensing:
    """What judging a licence needs from outside of it."""

    roots: tuple[Root, ...]  # the vendor's, compiled in or configured; never from a licence
    now_s: Callable[[], int]
    state: Path | None = None  # directory of the last start's time; None where nothing can be kept
    started: bool = False  # True when an engine restarts in a container that was admitted: dates stay judged


@dataclass(frozen=True, slots=True)
class Verdict:
    """An admitted licence and the days it has left; a day that has begun counts, 0 when the time is over."""

    licence: Licence
    days_left: int
    grace_days_left: int  # after `days_left`
    in_grace: bool  # the licence is over, its days of grace are running


def read(path: Path) -> bytes:
    """Return the file's content, cut one byte after the largest licence. Raises KeyRefused."""
    refusal: Refusal | None = None
    content = bytearray()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                refusal = Refusal.LICENCE_UNREADABLE
            while refusal is None and len(content) <= MAX_LICENCE_BYTES:
                part = os.read(descriptor, MAX_LICENCE_BYTES + 1 - len(content))
                if not part:
                    break
                content += part
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        refusal = Refusal.LICENCE_MISSING
    except OSError:
        refusal = Refusal.LICENCE_UNREADABLE
    if refusal is not None:
        raise KeyRefused(refusal)
    return bytes(content)


def admit(path: Path, licensing: Licensing) -> Verdict:
    """Return the licence at `path` with its days left, or refuse the start. Raises KeyRefused.

    With a state directory, a clock behind the last start is refused and this start is recorded.
    """
    now_s = licensing.now_s()
    licence = verify(read(path), licensing.roots, now_s)
    if not licensing.started:
        if licensing.state is not None:
            clock.check(licensing.state, now_s)
        check_dates(licence.terms, now_s)
        if licensing.state is not None:
            clock.record(licensing.state, now_s)
    return judged(licence, now_s)


def check_dates(terms: Terms, now_s: int) -> None:
    """Raise KeyRefused unless `now_s` is within the licence or its grace."""
    if now_s < terms.not_before_s:
        raise KeyRefused(Refusal.LICENCE_NOT_YET_VALID)
    if now_s > terms.not_after_s + GRACE_DAYS * DAY_S:
        raise KeyRefused(Refusal.LICENCE_EXPIRED)


def judged(licence: Licence, now_s: int) -> Verdict:
    """Return the days left at `now_s`."""
    past_s = now_s - licence.terms.not_after_s
    days_left = max(0, -(past_s // DAY_S))
    grace_days_left = GRACE_DAYS - max(0, min(GRACE_DAYS, past_s // DAY_S))
    return Verdict(licence, days_left, grace_days_left, in_grace=past_s > 0)


def check_package(terms: Terms, manifest: Manifest) -> None:
    """Raise KeyRefused unless the terms cover the package: its owner, its id, its epoch."""
    if manifest.owner is not Owner.VENDOR:
        raise KeyRefused(Refusal.LICENCE_FOR_VENDOR_PACKAGES)
    if manifest.package_id not in terms.package_ids:
        raise KeyRefused(Refusal.LICENCE_FOR_ANOTHER_PACKAGE)
    if manifest.epoch < terms.epoch_min:
        raise KeyRefused(Refusal.LICENCE_EPOCH_ABOVE_PACKAGE)


def unwrap(licence: Licence, manifest: Manifest, private: bytearray) -> bytearray:
    """Return the data key of the package of `manifest` for the installation that holds `private`.

    The caller wipes it and holds it against the commitment. Raises KeyRefused, HpkeError for a malformed key.
    """
    check_package(licence.terms, manifest)
    mine = key_id(Scheme.X25519, hpke.public_of(private))
    entry = next(
        (key for key in licence.keys if (key.package_id, key.key_id) == (manifest.package_id, mine)), None
    )
    if entry is None:
        raise KeyRefused(Refusal.LICENCE_FOR_ANOTHER_INSTALLATION)
    sealed = bytes.fromhex(entry.encapsulated + entry.ciphertext)
    data_key: bytearray | None
    try:
        data_key = hpke.open_(private, _info(licence.terms, manifest.package_id), sealed)
    except hpke.OpenRefused:
        data_key = None
    if data_key is None:
        raise KeyRefused(Refusal.LICENCE_TERMS_UNBOUND)
    return data_key


def make(terms: Terms, data_keys: Mapping[str, bytearray], installations: Iterable[bytes]) -> Licence:
    """Return an unsigned licence: each package's data key wrapped for each installation's public key.

    `data_keys` maps package ids, hex, to keys that stay the caller's. Raises PublicKeyRefused.
    """
    keys = [
        _wrapped(terms, package_id, data_key, public)
        for package_id, data_key in data_keys.items()
        for public in installations
    ]
    keys.sort(key=lambda key: (key.package_id, key.key_id))
    return Licence(keys=tuple(keys), terms=terms)


def _wrapped(terms: Terms, package_id: str, data_key: bytearray, public: bytes) -> WrappedKey:
    sealed = hpke.seal(public, _info(terms, package_id), data_key)
    return WrappedKey(
        ciphertext=sealed[hpke.ENC_BYTES :].hex(),
        encapsulated=sealed[: hpke.ENC_BYTES].hex(),
        key_id=key_id(Scheme.X25519, public),
        package_id=package_id,
    )


def _info(terms: Terms, package_id: str) -> bytes:
    return INFO_LABEL + terms.digest + bytes.fromhex(package_id)
