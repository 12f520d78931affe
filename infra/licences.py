"""Making, showing and checking licences for `strongroom licence`.

Owns: days of the calendar, what is read from where.
Must not know: the licence's form, wrapping (model_package).
Invariant: a licence is made only for packages whose signature holds, with the key they commit to; checking
records nothing, so that it can be repeated.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.keys import refusals
from infra.report import CommandError, ExitCode, Result

if TYPE_CHECKING:  # the command line must not import the room before a verb runs
    from model_package.licence_form import Licence, Terms
    from model_package.manifest import Manifest
    from model_package.signature import Root

DAY_S: Final = 86_400
PUBLIC_MODE: Final = 0o644  # a licence holds no secret: its keys are wrapped


@dataclass(frozen=True, slots=True)
class Order:
    """What the vendor agreed with the customer; days as YYYY-MM-DD, both included."""

    customer: str
    id: str
    not_before: str | None
    not_after: str
    features: tuple[str, ...]
    epoch_min: int


def make(
    packages: Sequence[Path],
    key: str,
    signing_key: Path,
    installations: Sequence[str],
    order: Order,
    roots: Sequence[str],
    out: Path,
) -> Result:
    """Write the licence to `out` and return its terms. Raises CommandError."""
    now_s = int(time.time())
    with refusals():
        from model_package import key_files, licence, licence_form, public_keys, secret, signing_keys
        from model_package.signature import Root

        secret.harden_process()
        holders = [public_keys.parse(text, public_keys.Kind.RECIPIENT).raw for text in installations]
        trusted = _roots(roots)
        data_keys: dict[str, bytearray] = {}
        try:
            with secret.wiping(key_files.read_file(signing_key)) as private:
                trusted.append(Root(signing_keys.public_of(private)))
                for path in packages:
                    manifest = _manifest(path, trusted, now_s)
                    data_keys[manifest.package_id] = _data_key(key, manifest)
                made = licence.make(_terms(order, data_keys, now_s), data_keys, holders)
                raw = licence_form.sign(made, private)
        finally:
            for data_key in data_keys.values():
                secret.wipe(data_key)
        key_files.write_new_text(out, raw, PUBLIC_MODE)
    return {"file": str(out), **_described(made)}


def read(file: Path, roots: Sequence[str]) -> Result:
    """Return the terms of the licence in `file`, whose signature holds under a root. Raises CommandError."""
    with refusals():
        from model_package import licence, licence_form

        held = licence_form.verify(licence.read(file), _roots(roots), int(time.time()))
        return {"file": str(file), **_described(held)}


def check(
    file: Path, roots: Sequence[str], package: Path | None, key: str | None, state: Path | None
) -> Result:
    """Return the terms and the days left, as a start now would judge them. Raises CommandError."""
    now_s = int(time.time())
    if (package is None) is not (key is None):
        raise CommandError(ExitCode.USAGE, "bad_argument", "give `--package` and `--key` together or neither")
    with refusals():
        from model_package import clock, licence, licence_form

        trusted = _roots(roots)
        held = licence_form.verify(licence.read(file), trusted, now_s)
        if state is not None:
            clock.check(state, now_s)
        licence.check_dates(held.terms, now_s)
        verdict = licence.judged(held, now_s)
        if package is not None and key is not None:
            _check_opens(held, package, key, trusted, now_s)
    return {
        "file": str(file),
        **_described(held),
        "days_left": verdict.days_left,
        "grace_days_left": verdict.grace_days_left,
        "in_grace": verdict.in_grace,
        "opens": package is not None,
    }


def show(result: Result) -> None:
    """Print the terms, one a line."""
    for name in ("file", "id", "customer", "not_before", "not_after", "epoch_min"):
        print(f"{name.replace('_', ' ')}: {result[name]}")
    print(f"features: {', '.join(result['features']) or 'none'}")
    print(f"packages: {', '.join(result['package_ids'])}")
    print(f"installations: {', '.join(result['installations']) or 'none'}")
    if "days_left" in result:
        print(f"days left: {result['days_left']}, then {result['grace_days_left']} of grace")
        if result["opens"]:
            print("the package's key unwraps for this installation")


def _check_opens(held: Licence, package: Path, key: str, roots: list[Root], now_s: int) -> None:
    from model_package import licence, schedule, secret, sources

    secret.harden_process()
    manifest = _manifest(package, roots, now_s)
    with secret.wiping(sources.source(key, os.environ).read()) as private:
        data_key = licence.unwrap(held, manifest, private)
    with secret.wiping(data_key):
        schedule.check_commitment(
            data_key, bytes.fromhex(manifest.package_id), bytes.fromhex(manifest.commitment)
        )


def _manifest(package: Path, roots: list[Root], now_s: int) -> Manifest:
    from model_package import opener
    from model_package.recipients import Owner
    from model_package.signature import Roots

    trust = opener.Trust(Owner.VENDOR, Roots(vendor=tuple(roots)), now_s)
    with opener.open_package(package, trust) as opened:
        return opened.manifest


def _data_key(source: str, manifest: Manifest) -> bytearray:
    """Return the package's data key, held against what the package commits to."""
    from model_package import providers, schedule, secret

    data_key = providers.provider(source, providers.Means(os.environ)).data_key(manifest)
    try:
        schedule.check_commitment(
            data_key, bytes.fromhex(manifest.package_id), bytes.fromhex(manifest.commitment)
        )
    except BaseException:
        secret.wipe(data_key)
        raise
    return data_key


def _roots(texts: Iterable[str]) -> list[Root]:
    from model_package import public_keys
    from model_package.signature import Root

    return [Root(public_keys.parse(text, public_keys.Kind.SIGNING).raw) for text in texts]


def _terms(order: Order, package_ids: Iterable[str], now_s: int) -> Terms:
    from model_package.licence_form import Terms

    first_s = now_s if order.not_before is None else _day_s(order.not_before)
    return Terms(
        customer=order.customer,
        epoch_min=order.epoch_min,
        features=tuple(sorted(set(order.features))),
        format=1,
        id=order.id,
        not_after_s=_day_s(order.not_after) + DAY_S - 1,
        not_before_s=first_s,
        package_ids=tuple(sorted(package_ids)),
    )


def _day_s(day: str) -> int:
    """Return when `day` begins in UTC, in seconds since 1970. Raises CommandError."""
    try:
        begins = datetime.datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        begins = None
    if begins is None or begins.year < 1970 or begins.strftime("%Y-%m-%d") != day:
        raise CommandError(ExitCode.USAGE, "bad_argument", "a day is not written as YYYY-MM-DD")
    return int(begins.timestamp())


def _described(held: Licence) -> Result:
    terms = held.terms

    def written(at_s: int) -> str:
        return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    return {
        "id": terms.id,
        "customer": terms.customer,
        "not_before": written(terms.not_before_s),
        "not_after": written(terms.not_after_s),
        "features": list(terms.features),
        "epoch_min": terms.epoch_min,
        "package_ids": list(terms.package_ids),
        "installations": sorted({key.key_id for key in held.keys}),
    }
