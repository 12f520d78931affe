"""Sealing, verifying, opening and comparing sealed packages for `strongroom package`.

Owns: which keys and roots a verb reads, progress, results. Must not know: the format (model_package does).
Invariant: keys are read in a hardened process and wiped before the verb returns; a package is opened under
roots given on the command line alone; no tensor's name is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.keys import refusals
from infra.meter import Meter
from infra.report import CommandError, ExitCode, Result

if TYPE_CHECKING:  # the command line must not import the room before a verb runs
    from model_package.manifest import Base, Manifest
    from model_package.opener import Package
    from model_package.signature import Root, Roots

MANIFEST_NAME: Final = "manifest.json"  # FORMAT.md 2
TEST_MODE: Final = "STRONGROOM_TEST_MODE"


@dataclass(frozen=True, slots=True)
class Trusted:
    """Whose package is expected, and who may have signed it."""

    owner: str
    roots: tuple[str, ...]
    base: Path | None = None  # of an adapter
    base_roots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """What a new package is to say of itself."""

    name: str
    version: str
    epoch: int
    recipients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Extras:
    """What a build adds to a sealing."""

    texts: Mapping[str, bytes] = field(default_factory=dict)  # laid beside the package in the clear
    described: tuple[str, str | None, Result] | None = None  # licence, base model, quality report
    oms_key: Path | None = None  # signs an OpenSSF model-signing bundle
    nonce_seed: str | None = None  # hex; in test mode alone


def files_of(directory: Path) -> dict[str, Path]:
    """Return name in a package -> file below `directory`. Raises CommandError."""
    with _failures():
        from model_package import sealer

        return sealer.files_of(directory)


def seal(
    files: Mapping[str, Path],
    out: Path,
    order: Order,
    trusted: Trusted,
    key: str,
    signing_key: Path,
    threads: int,
    extras: Extras | None = None,
) -> Result:
    """Seal `files` into `out`, or go on where that was interrupted. Raises CommandError."""
    extras = extras or Extras()
    drawn = _drawn(extras.nonce_seed, order, out)
    with _failures():
        from model_package import beside, bom, key_files, sealer, secret
        from model_package.manifest import Model
        from model_package.recipients import Owner

        secret.harden_process()
        described = None if extras.described is None else bom.Described(*extras.described)
        told = sealer.Sealing(
            owner=Owner(trusted.owner),
            model=Model(order.name, order.version),
            created_s=int(time.time()) if extras.nonce_seed is None else 0,
            epoch=order.epoch,
            base=_base(trusted),
            threads=threads,
            draw=drawn,
        )
        meter = Meter("sealing")
        with (
            secret.wiping(_data_key(key, None)) as data_key,
            secret.wiping(key_files.read_file(signing_key)) as signer,
            _optional_key(extras.oms_key) as oms_key,
        ):
            wrap = sealer.to_public_keys(_holders(order.recipients))
            told = replace(told, documents=beside.Documents(extras.texts, described, oms_key=oms_key))
            made = sealer.seal(files, out, told, data_key, wrap, signer, meter.show)
    return {"package": str(out), **_described(made), **meter.result()}


def _drawn(nonce_seed: str | None, order: Order, out: Path) -> Callable[[int], bytes]:
    """Return where ids come from: the system, or in test mode a seed. Raises CommandError.

    Ids that repeat under a data key repeat nonces, which gives the plain bytes away: a seed seals nothing
    that anybody needs kept.
    """
    if nonce_seed is None:
        return os.urandom
    refused = ""
    if os.environ.get(TEST_MODE) != "1":
        refused = f"a nonce seed is for tests: it is refused unless `{TEST_MODE}` is 1"
    elif order.recipients:
        refused = "a nonce seed makes nothing reproducible for recipients: wrapping draws for itself"
    elif out.exists() and any(out.iterdir()):
        refused = "a nonce seed cannot go on where a sealing stopped: ids would come twice"
    if refused:
        raise CommandError(ExitCode.USAGE, "seed_refused", refused, "leave the seed away")
    drawn = 0

    def draw(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.sha256(f"{drawn} {nonce_seed}".encode()).digest()[:count]

    return draw


def inspect(package: Path, trusted: Trusted, key: str | None) -> Result:
    """Return what a package and its bill of materials say; with the key also its tensors' number.

    Raises CommandError.
    """
    with _failures(), _opened(package, trusted) as opened:
        from model_package import bom

        result = {"package": str(package), **_described(opened.manifest)}
        bill = _proved(package, trusted, opened.manifest)
        if bill is not None:
            result |= bom.summary(bill)
        if key is not None:
            from model_package import comparing, secret

            secret.harden_process()
            with opened.unlock(_data_key(key, opened.manifest)) as contents:
                result["tensors"] = comparing.tensor_counts(contents)
        return result


def verify(package: Path, trusted: Trusted, oms_root: Path | None = None) -> Result:
    """Prove every byte of a package and of the documents beside it, without its key. Raises CommandError.

    `oms_root`, a public key as PEM, has the OpenSSF model-signing bundle proved as well.
    """
    with _failures(), _opened(package, trusted) as opened:
        from model_package import beside, oms

        documents = _proved(package, trusted, opened.manifest) is not None
        if oms_root is not None:
            bundle = beside.read(package).get(oms.NAME, b"")
            oms.check(package, bundle, oms_root.read_bytes())
        total = sum(entry.size for entry in opened.manifest.files)
        meter = Meter("verifying")
        opened.prove_whole(lambda done: meter.show(done, total))
        signer = opened.signer.signer_id.hex()
        shown = {"signer": signer, "bill_of_materials": documents, "model_signing": oms_root is not None}
        return {"package": str(package), **_described(opened.manifest), **shown, **meter.result()}


def unseal(package: Path, trusted: Trusted, key: str, out: Path, threads: int) -> Result:
    """Write a package's plain files to `out`, for its owner. Raises CommandError."""
    with _failures(), _opened(package, trusted) as opened:
        from model_package import secret, unsealing

        secret.harden_process()
        total = sum(entry.size for entry in opened.manifest.files)
        meter, done = Meter("unsealing"), 0

        def advance(plain_bytes: int) -> None:
            nonlocal done
            done += plain_bytes
            meter.show(done, total)

        with opened.unlock(_data_key(key, opened.manifest), threads) as contents:
            written = unsealing.unseal(contents, out, advance)
        return {"package": str(package), "out": str(out), "plain_bytes": written, **meter.result()}


def archive(package: Path, trusted: Trusted, out: Path) -> Result:
    """Write a package as one `model.tar.gz`. Raises CommandError."""
    with _failures(), _opened(package, trusted) as opened:
        from model_package import archive as room

        total = sum(entry.size for entry in opened.manifest.files)
        meter, done = Meter("packing"), 0

        def advance(packed_bytes: int) -> None:
            nonlocal done
            done += packed_bytes
            meter.show(min(done, total), total)

        size = room.write(package, opened.manifest, out, advance)
        return {"package": str(package), "archive": str(out), "archive_bytes": size, **meter.result()}


def rewrap(
    package: Path,
    trusted: Trusted,
    key: str,
    signing_key: Path,
    recipients: Sequence[str],
    out: Path,
    epoch: int | None,
    oms_key: Path | None = None,
) -> Result:
    """Write the same sealed files to `out` for other recipients. Raises CommandError."""
    with _failures(), _opened(package, trusted) as opened:
        from model_package import beside, key_files, rewrapping, sealer, secret

        secret.harden_process()
        wrap = sealer.to_public_keys(_holders(recipients))
        proved = _proved(package, trusted, opened.manifest) is not None
        found = beside.read(package) if proved else {}  # what nobody signed is not taken along
        texts: dict[str, bytes] = {name: found[name] for name in beside.TEXTS if name in found}
        with (
            secret.wiping(key_files.read_file(signing_key)) as signer,
            _optional_key(oms_key) as oms_private,
        ):
            documents = beside.Documents(texts, bill=found.get(beside.BOM_NAME), oms_key=oms_private)
            data_key = _data_key(key, opened.manifest)
            made = rewrapping.rewrap(package, opened, out, data_key, wrap, signer, epoch, documents)
        return {"package": str(out), **_described(made)}


def diff(first: Path, second: Path, trusted: Trusted, keys: Sequence[str]) -> Result:
    """Return in what two packages differ; what they hold only with the keys of both. Raises CommandError."""
    if len(keys) not in (0, 2):
        raise CommandError(
            ExitCode.USAGE, "bad_argument", "give `--key` twice, for each package, or not at all"
        )
    with _failures(), _opened(first, trusted) as one, _opened(second, trusted) as two:
        from model_package import comparing, secret

        if not keys:
            found = comparing.difference(one.manifest, two.manifest)
        else:
            secret.harden_process()
            with (
                one.unlock(_data_key(keys[0], one.manifest)) as mine,
                two.unlock(_data_key(keys[1], two.manifest)) as other,
            ):
                found = comparing.difference(one.manifest, two.manifest, (mine, other))
    return {"first": str(first), "second": str(second), **asdict(found), "same_content": found.same_content}


def show(result: Result) -> None:
    """Print a result, one field a line; files and recipients in lines of their own."""
    for name, value in result.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            print(f"{name}:")
            for each in value:
                print("  " + "  ".join(str(part) for part in each.values()))
        elif isinstance(value, dict):
            print(f"{name}: " + ", ".join(f"{key} {part}" for key, part in value.items()))
        else:
            print(f"{name.replace('_', ' ')}: {value}")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn what packages and disks raise into CommandError."""
    failure: CommandError | None = None
    with refusals():
        from model_package.sealing import SealError

        try:
            yield
        except SealError as error:
            message, _, hint = str(error).partition("\nhint: ")
            failure = CommandError(ExitCode.USAGE, "seal_refused", message, hint)
        except OSError as error:
            said = f"the system refused: {os.strerror(error.errno or 0).lower()}"
            failure = CommandError(
                ExitCode.ENVIRONMENT_MISSING, "system_refused", said, "check space and modes"
            )
    if failure is not None:  # outside the handlers: no traceback holds a key
        raise failure


@contextlib.contextmanager
def _opened(path: Path, trusted: Trusted) -> Iterator[Package]:
    from model_package import opener
    from model_package.recipients import Owner

    base = _base(trusted)
    trust = opener.Trust(Owner(trusted.owner), _by_owner(trusted), int(time.time()), base=base)
    with opener.open_package(path, trust) as package:
        yield package


@contextlib.contextmanager
def _optional_key(path: Path | None) -> Iterator[bytearray | None]:
    from model_package import key_files, secret

    if path is None:
        yield None
        return
    with secret.wiping(key_files.read_file(path)) as private:
        yield private


def _proved(package: Path, trusted: Trusted, manifest: Manifest) -> Result | None:
    """Return the bill of materials beside a package, proved with the documents that it names."""
    from model_package import beside

    return beside.prove(package, manifest, _by_owner(trusted), int(time.time()))


def _by_owner(trusted: Trusted) -> Roots:
    from model_package.recipients import Owner
    from model_package.signature import Roots

    roots = _roots(trusted.roots)
    return Roots(vendor=roots) if trusted.owner == Owner.VENDOR else Roots(customer=roots)


def _base(trusted: Trusted) -> Base | None:
    """Return what an adapter names as its base: the vendor's package at that path, its signature checked."""
    if trusted.base is None:
        return None
    with _opened(trusted.base, Trusted("vendor", trusted.base_roots)) as base:
        return base.manifest.as_base


def _data_key(key: str, manifest: Manifest | None) -> bytearray:
    """Return the data key from its source; without a manifest, from a source that holds the key itself."""
    from model_package import providers, sources

    if manifest is None:
        return sources.source(key, os.environ).read()
    return providers.provider(key, providers.Means(os.environ)).data_key(manifest)


def _roots(texts: Sequence[str]) -> tuple[Root, ...]:
    from model_package import public_keys
    from model_package.signature import Root

    return tuple(Root(public_keys.parse(text, public_keys.Kind.SIGNING).raw) for text in texts)


def _holders(texts: Sequence[str]) -> list[bytes]:
    from model_package import public_keys

    return [
        public_keys.parse(text, public_keys.Kind.RECIPIENT, public_keys.Kind.HYBRID).raw for text in texts
    ]


def _described(manifest: Manifest) -> Result:
    return {
        "model": f"{manifest.model.name} {manifest.model.version}",
        "owner": manifest.owner.value,
        "epoch": manifest.epoch,
        "created_s": manifest.created_s,
        "package_id": manifest.package_id,
        "content_sha256": manifest.content_sha256,
        "base": None if manifest.base is None else manifest.base.package_id,
        "files": [
            {"size": entry.size, "kind": entry.kind.value, "name": entry.name, "stored": entry.stored_name}
            for entry in manifest.files
        ],
        "recipients": [
            {"scheme": entry.scheme.value, "key_id": entry.key_id} for entry in manifest.recipients
        ],
    }
