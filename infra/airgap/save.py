"""Making a bundle: a verified release, what runs it, what describes it, and one signature over all.

Owns: the bundle's layout, its manifest, the packing. Must not know: forms of a release's documents.
Invariant: the same release, model and key give the same bytes; the archive appears whole or not at all; a
release that does not verify is not packed.

    MANIFEST.json  SHA256SUMS  SHA256SUMS.sig  keys/  images/  model/  templates/  run/  bin/  docs/
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from infra.image import build
from infra.release import files, openssl, verify
from infra.release.files import Release, ReleaseRefused

HERE: Final = Path(__file__).parent
ROOT: Final = build.ROOT
SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "SHA256SUMS.sig"
ARCHITECTURE: Final = {"x86_64": "amd64", "aarch64": "arm64"}
MIN_DOCKER: Final = "20.10"
# The archive, what docker makes of it, and room to work: of the image's own size.
DISK_FACTOR: Final = 3
PAGES: Final = {
    "SETTINGS.md": "sagemaker_entry/SETTINGS.md",
    "ERRORS.md": "sagemaker_entry/ERRORS.md",
    "PACKAGE.md": "model_package/FORMAT.md",
    "KEYS.md": "model_package/KEYS.md",
    "LICENSE": "LICENSE",
}
NO_MODEL: Final = (
    "Put the sealed package or the model's folder here, or name any other folder to bin/run.sh.\n"
)
PLAIN_NAME: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-/")


def main(arguments: list[str]) -> int:
    """Make a bundle; the last line of stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="scripts/airgap-save", allow_abbrev=False)
    parser.add_argument("--release", type=Path, required=True, help="a folder of scripts/make-release")
    parser.add_argument("--key", type=Path, required=True, help="the vendor's private key that signed it")
    parser.add_argument("--model", type=Path, help="folder of a sealed package, or of a model, to go with it")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the bundle's archive")
    chosen = parser.parse_args(arguments)
    try:
        report = save(chosen.release, chosen.key, chosen.model, chosen.out)
    except (ReleaseRefused, openssl.SigningRefused) as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 5
    except OSError as error:
        print(f"error: {error.strerror}: `{error.filename}`\nhint: choose another path", file=sys.stderr)
        return 3
    print(json.dumps(report, separators=(",", ":")))
    return 0


def save(release: Path, key: Path, model: Path | None, out: Path) -> dict[str, Any]:
    """Write the bundle's archive below `out`; return what it is. Raises ReleaseRefused, SigningRefused."""
    public = release / files.PUBLIC_KEY
    if openssl.public_key(key) != public.read_bytes():
        raise ReleaseRefused("the release was signed by another key", "use the key that signed it")
    said = verify.verify(release, public, None)
    architecture = ARCHITECTURE[_machine(release)]
    name = f"strongroom-{said.version}-{said.variant}-linux-{architecture}-airgap"
    folder, packed = out / name, out / f"{name}.tar"
    folder.mkdir(parents=True)
    try:
        lay_out(folder, release, said, architecture, model)
        sign(folder, key)
        partial = packed.with_suffix(".partial")
        pack(folder, partial, said.created_s)
        partial.rename(packed)
    finally:
        shutil.rmtree(folder)
    size_bytes = packed.stat().st_size
    return {
        "ok": True,
        "bundle": str(packed),
        "size_mb": round(size_bytes / 1e6, 1),
        "image_id": said.image_id,
        "key_fingerprint": openssl.fingerprint(public),
    }


def lay_out(folder: Path, release: Path, said: Release, architecture: str, model: Path | None) -> None:
    """Fill `folder` with everything but the sums and their signature; raises ReleaseRefused."""
    for part in ("bin", "run", "docs"):
        shutil.copytree(HERE / part, folder / part, copy_function=shutil.copyfile)
    for name, source in PAGES.items():
        shutil.copyfile(ROOT / source, folder / "docs" / name)
    shutil.copytree(ROOT / "infra" / "rendered", folder / "templates", copy_function=shutil.copyfile)
    (folder / "keys").mkdir()
    shutil.copyfile(release / files.PUBLIC_KEY, folder / "keys" / "vendor.pub")
    images = folder / "images"
    images.mkdir()
    with (release / files.ARCHIVE).open("rb") as source_file:
        compress(source_file, images / "strongroom.tar.gz")
    for name in (*files.LISTED[1:], files.RELEASE, files.SIGNATURE):
        shutil.copyfile(release / name, images / name)
    image_bytes = (release / files.ARCHIVE).stat().st_size
    facts = {
        "IMAGE": said.tag,
        "IMAGE_ID": said.image_id,
        "ARCHITECTURE": architecture,
        "NEEDED_KB": str(DISK_FACTOR * image_bytes // 1024),
    }
    for name, value in facts.items():
        (images / name).write_text(value + "\n")
    if model is None:
        (folder / "model").mkdir()
        (folder / "model" / "README").write_text(NO_MODEL)
    else:
        shutil.copytree(model, folder / "model", copy_function=shutil.copyfile, symlinks=False)
    described = [
        {
            "path": path,
            "size": (folder / path).stat().st_size,
            "sha256": files.digest(folder / path),
            "mode": "0644",
        }
        for path in paths(folder)
    ]
    manifest = {
        "product": said.name,
        "version": said.version,
        "git_commit": said.revision,
        "created": said.created_s,
        "images": [{"ref": said.tag, "image_id": said.image_id, "arch": architecture, "size": image_bytes}],
        "model": None if model is None else {"name": model.name, "files": len(list(paths(folder / "model")))},
        "min_docker": MIN_DOCKER,
        "disk_needed_bytes": DISK_FACTOR * image_bytes,
        "files": described,
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def paths(folder: Path) -> Iterator[str]:
    """Yield the files below `folder` in order; raises ReleaseRefused for a name a shell could misread."""
    for path in sorted(folder.rglob("*"), key=lambda one: str(one.relative_to(folder)).encode()):
        name = str(path.relative_to(folder))
        if path.is_dir():
            continue
        if not set(name) <= PLAIN_NAME or ".." in name or name.startswith("-"):
            raise ReleaseRefused(
                f"the file name {name!r} cannot travel", "use letters, digits, `.`, `_`, `-`"
            )
        yield name


def sign(folder: Path, key: Path) -> None:
    """Write the sums over every file, and the signature over them; raises SigningRefused."""
    lines = "".join(f"{files.digest(folder / path)}  {path}\n" for path in paths(folder))
    (folder / SUMS).write_text(lines)
    (folder / SIGNATURE).write_bytes(openssl.sign(key, lines.encode()))


def compress(source: IO[bytes], target: Path) -> None:
    """Write `source` compressed, without a name or a time."""
    with (
        target.open("wb") as plain,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=plain, mtime=0) as packed,
    ):
        shutil.copyfileobj(source, packed, 1024 * 1024)


def pack(folder: Path, target: Path, epoch_s: int) -> None:
    """Write `folder` as an archive whose bytes depend on names and contents alone."""
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        for path in [folder, *sorted(folder.rglob("*"), key=lambda one: str(one).encode())]:
            member = tarfile.TarInfo(str(path.relative_to(folder.parent)))
            member.mtime = epoch_s
            if path.is_dir():
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
                continue
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as source:
                archive.addfile(member, source)


def _machine(release: Path) -> str:
    from infra.image.subject import Image

    with Image(release / files.ARCHIVE) as image:
        named = str(image.document["architecture"])
    return {value: key for key, value in ARCHITECTURE.items()}[named]


def sums_sha256(folder: Path) -> str:
    """Return what two bundles of the same contents share."""
    return hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
