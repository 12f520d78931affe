"""Gathering a listing's facts: the vendor's file, the package, results files, a running server.

Owns: the order. Must not know: what a folder holds.
Invariant: the package's signature is checked before its name is used; nothing is written before all is there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from infra import packages
from infra.marketplace import figures, folder, notebook, rehearsal, request, samples, vendor
from infra.report import CommandError, ExitCode, Result


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line names. `speed` texts are `[INSTANCE_TYPE=]FILE`, `quality` is `VARIANT=FILE`."""

    vendor: Path
    package: Path
    roots: tuple[str, ...]
    speed: tuple[str, ...]
    quality: str | None
    server: str
    out: Path


def build(given: Given) -> Result:
    """Write a listing's folder and return what its check finds; raises CommandError."""
    words, terms = vendor.read(given.vendor)
    model = _model(given.package, given.roots)
    speeds = figures.read_speed(list(given.speed), words.workloads)
    quality = _quality(given.quality)
    recording, files = samples.record(given.server, words.samples)
    cells = notebook.cells(words, recording.batch_type)
    printed = rehearsal.run(cells, given.server, words.product.package_name)
    files[notebook.NAME] = notebook.text(notebook.document(cells, printed)).encode()
    executed = hashlib.sha256(files[notebook.NAME]).hexdigest()
    facts = folder.Facts(folder.FORMAT, words, terms, model, speeds, quality, recording, executed)
    return folder.write(given.out, facts, files)


def _model(package: Path, roots: tuple[str, ...]) -> request.Model:
    told = packages.inspect(package, packages.Trusted("vendor", roots), None)
    name, _, version = str(told["model"]).rpartition(" ")
    sealed_bytes = sum(int(entry["size"]) for entry in told["files"])
    return request.Model(name, version, told["package_id"], told["content_sha256"], sealed_bytes)


def _quality(text: str | None) -> figures.Quality | None:
    if text is None:
        return None
    variant, equals, name = text.partition("=")
    if not equals:
        raise CommandError(ExitCode.USAGE, "bad_argument", f"`{text}` is not VARIANT=FILE")
    return figures.read_quality(Path(name), variant)
