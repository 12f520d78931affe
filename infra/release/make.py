"""Making a release of an image that is built: the archive, its bills, its provenance, one signature.

Owns: the order of the steps. Must not know: forms of the documents.
Invariant: nothing is released whose bills do not cover it or whose packages are below the pinned advisories;
the folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from infra.image import advisories, archive, build, wheelhouse
from infra.image.docker import DockerFailed, docker
from infra.image.subject import Image
from infra.release import bills, components, files, openssl, provenance
from infra.release.files import Release, ReleaseRefused

IMAGE_LABEL: Final = "org.opencontainers.image."
LABELS: Final = (
    *(f"{IMAGE_LABEL}{name}" for name in ("version", "revision", "base.digest")),
    "strongroom.variant",
)


def main(arguments: list[str]) -> int:
    """Make a release; the last line of stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="scripts/make-release", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--key", type=Path, required=True, help="the vendor's Ed25519 private key, PEM")
    parser.add_argument("--new-key", action="store_true", help="make that key first")
    parser.add_argument("--tag", default=f"{build.NAME}:{build.version()}-cpu")
    parser.add_argument("--cache", type=Path, default=build.ROOT / ".cache" / "image")
    parser.add_argument("--model-manifest", type=Path, help="manifest of the sealed package it goes with")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.new_key:
            openssl.make_key(chosen.key)
        partial = chosen.out.with_name(chosen.out.name + ".partial")
        partial.mkdir(parents=True)
        try:
            docker("save", "--output", str(partial / files.ARCHIVE), chosen.tag)
            report = make(partial, chosen.key, chosen.tag, chosen.cache, chosen.model_manifest)
            partial.rename(chosen.out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (DockerFailed, openssl.SigningRefused, ReleaseRefused) as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"error: {error.strerror}: `{error.filename}`\nhint: choose another path", file=sys.stderr)
        return 3
    print(json.dumps(report, separators=(",", ":")))
    return 0


def make(
    folder: Path, key: Path, tag: str, cache: Path, model_manifest: Path | None = None
) -> dict[str, Any]:
    """Complete `folder`, which holds the image's archive, to a release; return what it is.

    Raises ReleaseRefused, SigningRefused.
    """
    try:
        identity = archive.identify(folder / files.ARCHIVE)
    except archive.ArchiveRefused as error:
        raise ReleaseRefused(str(error), "build the image again") from error
    with Image(folder / files.ARCHIVE) as image:
        parts = _components(image)
        refuse_old(image)
        labels, created = image.labels(), image.document["created"]
    unsaid = [name for name in LABELS if not labels.get(name)]
    if unsaid:
        raise ReleaseRefused(f"the image has no label `{unsaid[0]}`", "build it with scripts/build-image")
    product = bills.Product(
        build.NAME,
        labels[LABELS[0]],
        labels[LABELS[3]],
        identity.image_id,
        identity.manifest_digest,
        int(datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp()),
    )
    revision, base = labels[LABELS[1]], labels[LABELS[2]]
    public = folder / files.PUBLIC_KEY
    public.write_bytes(openssl.public_key(key))
    print_ = openssl.fingerprint(public)
    _write(folder / files.CYCLONEDX, bills.cyclonedx(product, parts))
    _write(folder / files.SPDX, bills.spdx(product, parts))
    _write(folder / files.ADVISORIES, advisories.pinned())
    wheels = {
        path.name: wheelhouse.digest(path) for path in (cache / f"wheelhouse-{product.variant}").glob("*")
    }
    said = provenance.statement(product, files.digest(folder / files.ARCHIVE), revision, base, wheels)
    _write(folder / files.PROVENANCE, provenance.seal(said, print_, lambda text: openssl.sign(key, text)))
    release = Release(
        product.name,
        product.version,
        product.variant,
        tag,
        revision,
        product.created_s,
        product.image_id,
        product.manifest_digest,
        {name: files.digest(folder / name) for name in files.LISTED},
        None if model_manifest is None else files.digest(model_manifest),
    )
    document = release.encode()
    (folder / files.RELEASE).write_bytes(document)
    (folder / files.SIGNATURE).write_bytes(openssl.sign(key, document))
    counts = {kind: sum(one.kind == kind for one in parts) for kind in ("pypi", "deb")}
    return {"ok": True, "image_id": product.image_id, "components": counts, "key_fingerprint": print_}


def refuse_old(image: Image) -> None:
    """Raise ReleaseRefused where a package is below its advisories."""
    found = advisories.below(image.distributions().values(), advisories.pinned())
    if found:
        raise ReleaseRefused("; ".join(found), "raise the version and run scripts/lock")


def _components(image: Image) -> tuple[components.Component, ...]:
    try:
        return components.components(image)
    except components.ComponentsRefused as error:
        raise ReleaseRefused(str(error), "build the image again") from error


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
