"""`strongroom package build`: from a checkpoint or a GGUF file to a sealed, signed, documented package.

Owns: the order of the stages, which files go in. Must not know: how a model is converted, divided or measured
(child processes do), what a package is made of (model_package does).
Invariant: plain files are made in a folder beside the package that only its owner enters; nothing opens until
the manifest is there; a build run again goes on with what is whole, and the folder goes when all is done.

    convert -> parts per ranks and scheme, held against the weights -> quality -> documents -> seal, sign
    -> archive
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra import keys as signing_keys
from infra import model_card, packages, packaging, workshop
from infra.report import CommandError, ExitCode, Result
from infra.workshop import Workshop

GGUF: Final = ".gguf"
FINISHED: Final = ".finished"
TAKEN: Final = "the destination holds a package already"
NONE: Final = "none"
SCHEMES: Final = (NONE, "int8-block", "int4-block", "fp8", "bnb-int8", "bnb-nf4")
MAX_RANKS: Final = 64
LICENCE_NAMES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt")
# Never sealed from a source: pickles, other runtimes' files, and what the build writes itself.
LEFT_OUT: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made, beside what every package says of itself."""

    source: Path
    out: Path
    tensor_parallel: tuple[int, ...]
    quantize: tuple[str, ...]
    quality_tokens: int
    declared: model_card.Declared
    licence_text: Path | None
    archive: Path | None
    without_weights: bool = False


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the keys lie, and, in test mode alone, what ids are drawn from."""

    data: str
    signing: Path
    oms: Path | None = None
    nonce_seed: str | None = None


def plan(
    source: Path,
    out: Path,
    tensor_parallel: str,
    quantize: str,
    quality_tokens: int,
    declared: model_card.Declared,
    licence_text: Path | None,
    archive: Path | None,
    *,
    without_weights: bool = False,
) -> Plan:
    """Return the plan that the options mean. Raises CommandError; reads no more than names."""
    ranks = tuple(_ranks(text) for text in tensor_parallel.split(","))
    schemes = tuple(quantize.split(","))
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown:
        raise _wrong(f"`--quantize {unknown[0]}` is not a scheme", "name some of " + ", ".join(SCHEMES))
    if len({*ranks}) != len(ranks) or len({*schemes}) != len(schemes):
        raise _wrong("a number of ranks or a scheme is named twice")
    if not source.is_dir() and not (source.is_file() and source.suffix == GGUF):
        raise _wrong("SOURCE is neither a directory nor a `.gguf` file")
    licence = licence_text or _licence_of(source)
    if licence is None or not licence.is_file():
        raise _wrong(
            "there is no licence text", "name the file with `--licence-text`, or put `LICENSE` into SOURCE"
        )
    if without_weights and (ranks, schemes) == ((1,), (NONE,)):
        raise _wrong(
            "`--without-weights` would leave nothing to serve",
            "name ranks or a scheme that parts are made for, as `--quantize int8-block`",
        )
    return Plan(source, out, ranks, schemes, quality_tokens, declared, licence, archive, without_weights)


def build(planned: Plan, order: packages.Order, keys: Keys, threads: int) -> Result:
    """Make the package, or go on where a build of the same plan was interrupted. Raises CommandError."""
    begun_s = time.monotonic()
    place, finished = (planned.out.with_name(planned.out.name + end) for end in (workshop.SUFFIX, FINISHED))
    packed = planned.archive is not None and planned.archive.exists()
    if finished.is_dir():  # only the clearing up was interrupted
        shutil.rmtree(finished)
        result = packages.verify(planned.out, _own(keys))
        if result["model"] == f"{order.name} {order.version}":
            return result
    if not place.is_dir() and (packed or (planned.out / packages.MANIFEST_NAME).exists()):
        raise _wrong("the archive exists already" if packed else TAKEN)
    with workshop.opened(place, _announce) as shop:
        grounds, files, extras = _prepare(planned, order, keys, shop)
        result = _sealed(planned, order, keys, threads, files, extras, resumed=shop.has("order", grounds))
        if planned.archive is not None:
            result |= _packed(planned.out, planned.archive, keys, shop, grounds)
    place.rename(finished)
    shutil.rmtree(finished)
    return {**result, "build_seconds": round(time.monotonic() - begun_s, 3)}


def _sealed(
    planned: Plan,
    order: packages.Order,
    keys: Keys,
    threads: int,
    files: dict[str, Path],
    extras: packages.Extras,
    *,
    resumed: bool,
) -> Result:
    """Seal, or prove whole what an earlier run of the same order sealed."""
    if (planned.out / packages.MANIFEST_NAME).exists():
        if not resumed:
            raise _wrong(TAKEN)
        return packages.verify(planned.out, _own(keys))
    trusted = packages.Trusted("vendor", ())
    return packages.seal(files, planned.out, order, trusted, keys.data, keys.signing, threads, extras)


def _packed(out: Path, archive: Path, keys: Keys, shop: Workshop, grounds: str) -> Result:
    """Write the archive; one that this build has begun may lie there whole and is written again."""
    if archive.exists():
        if not shop.has("archive", grounds):
            raise _wrong("the archive exists already")
        archive.unlink()
    shop.made("archive", grounds, lambda _: None)
    packed = packages.archive(out, _own(keys), archive)
    return {name: packed[name] for name in ("archive", "archive_bytes")}


def _own(keys: Keys) -> packages.Trusted:
    return packages.Trusted("vendor", (signing_keys.public(signing_keys.SIGNING, keys.signing)["public"],))


def _prepare(
    planned: Plan, order: packages.Order, keys: Keys, shop: Workshop
) -> tuple[str, dict[str, Path], packages.Extras]:
    """Return what tells this order from others, name in the package -> file, and what comes with them."""
    grounds = _grounds(planned.source)
    model = planned.source
    if planned.source.is_file():
        model = shop.made("model", grounds, lambda at: packaging.convert(planned.source, at, shop.lock))
        model = model / packaging.CONVERTED
    files = {name: path for name, path in packages.files_of(model).items() if _belongs(name, path)}
    files |= _parts(planned, model, grounds, shop)
    if planned.without_weights:
        files = {name: path for name, path in files.items() if not _holds_weights(name)}
    variants = [scheme for scheme in planned.quantize if scheme != NONE]
    measured = shop.made(
        "quality",
        f"{grounds} {planned.quality_tokens} {','.join(variants)}",
        lambda at: packaging.measure(model, at, variants, planned.quality_tokens, shop.lock),
    )
    report = packaging.read_report(measured)
    assert planned.licence_text is not None, "a plan has one"
    documents = {path.name: path.read_bytes() for path in sorted(measured.iterdir())}
    documents["LICENSE"] = planned.licence_text.read_bytes()
    card = model_card.text(order, planned.declared, report, sorted(files))
    documents["README.md"] = card.encode()
    written = shop.made(
        "documents", _digest(repr(sorted(documents.items()))), lambda at: _write(at, documents)
    )
    files |= packages.files_of(written)
    whole = _digest(repr((grounds, order, sorted(files), sorted(documents.items()))))
    described = (planned.declared.licence, planned.declared.base_model, report)
    if not (planned.out / packages.MANIFEST_NAME).exists():
        shop.made("order", whole, lambda _: None)
    return whole, files, packages.Extras(documents, described, keys.oms, keys.nonce_seed)


def _parts(planned: Plan, model: Path, grounds: str, shop: Workshop) -> dict[str, Path]:
    """Return the parts, name in the package -> file, once they are known to be of these weights."""
    files: dict[str, Path] = {}
    roots = [model / packaging.PARTS] if (model / packaging.PARTS).is_dir() else []
    for ranks in planned.tensor_parallel:
        for scheme in planned.quantize:
            if (ranks, scheme) != (1, NONE):  # which is what the weights are
                stage = f"parts-{ranks}-{scheme}"
                roots.append(shop.made(stage, grounds, _divided(model, ranks, scheme, shop.lock)))
                found = packages.files_of(roots[-1])
                files |= {f"{packaging.PARTS}/{name}": path for name, path in found.items()}
    if not roots:
        return files
    digest = packaging.belong(model, roots, shop.lock)  # anew each time: `grounds` trusts a file's time
    content = {packaging.WEIGHTS_DIGEST: digest.encode()}
    bound = shop.made("belonging", digest, lambda at: _write(at, content))
    return files | {f"{packaging.PARTS}/{name}": path for name, path in packages.files_of(bound).items()}


def _divided(model: Path, ranks: int, scheme: str, lock: int) -> Callable[[Path], None]:
    return lambda at: packaging.divide(model, at, ranks, scheme, lock)


def _write(folder: Path, documents: dict[str, bytes]) -> None:
    for name, content in documents.items():
        (folder / name).write_bytes(content)


def _belongs(name: str, path: Path) -> bool:
    """True for what a loader reads; a source's own card and licence are replaced by the package's."""
    return path.suffix not in LEFT_OUT and name not in (*LICENCE_NAMES, "README.md")


def _holds_weights(name: str) -> bool:
    """True for the unquantized weights and their index; parts lie in folders."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _licence_of(source: Path) -> Path | None:
    folder = source if source.is_dir() else source.parent
    return next((folder / name for name in LICENCE_NAMES if (folder / name).is_file()), None)


def _grounds(source: Path) -> str:
    """Return what tells this source from one that was changed: names, sizes and times of its files."""
    files = {source.name: source} if source.is_file() else packages.files_of(source)
    seen = {name: path.stat() for name, path in files.items()}
    text = repr([(name, found.st_size, found.st_mtime_ns) for name, found in sorted(seen.items())])
    return _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_RANKS:
        raise _wrong(f"`--tensor-parallel` is numbers from 1 to {MAX_RANKS}, divided by commas")
    return int(text)


def _announce(phrase: str) -> None:
    print(f"build: {phrase}", file=sys.stderr, flush=True)


def _wrong(message: str, hint: str = "") -> CommandError:
    return CommandError(ExitCode.USAGE, "bad_argument", message, hint)
