"""Verifying a release, without a network: who signed it, that nothing was changed, that it is what it says.

Owns: the order of the checks, the words for what is wrong. Must not know: how a release is made.
Invariant: the key comes from the caller, never from the folder alone; nothing of a file is read before its
hash is known to be right, and no hash is believed before the signature over it held.

    1  the signature over release.json        4  the bills cover the image, both ways
    2  the set of files                       5  the provenance is of this image and by this key
    3  every file's hash, the image's id      6  no package below the advisories, pinned there and here
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from infra.image import advisories, archive
from infra.image.docker import DockerFailed, inspect
from infra.image.subject import Image
from infra.release import bills, components, files, openssl, provenance
from infra.release.files import Release, ReleaseRefused


def main(arguments: list[str]) -> int:
    """Verify a release; the last line of stdout is one JSON document. Returns 1 when it is refused."""
    parser = argparse.ArgumentParser(prog="scripts/verify-release", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    trust = parser.add_mutually_exclusive_group(required=True)
    trust.add_argument("--key", type=Path, help="the vendor's public key, PEM, from another source")
    trust.add_argument("--fingerprint", help="SHA-256 of that key's DER form, from another source")
    parser.add_argument("--loaded", metavar="TAG", help="also compare an image that docker has loaded")
    chosen = parser.parse_args(arguments)
    try:
        release = verify(chosen.folder, chosen.key, chosen.fingerprint)
        if chosen.loaded is not None:
            compare(release, inspect(chosen.loaded)["Id"])
    except (ReleaseRefused, openssl.SigningRefused, DockerFailed) as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        print(json.dumps({"ok": False, "error": str(error)}, separators=(",", ":")))
        return 1
    said = {"version": release.version, "variant": release.variant, "image_id": release.image_id}
    print(json.dumps({"ok": True, **said, "revision": release.revision}, separators=(",", ":")))
    return 0


def verify(folder: Path, key: Path | None, fingerprint: str | None) -> Release:
    """Return what a sound release says of itself; raises ReleaseRefused, SigningRefused."""
    public = key if key is not None else _by_fingerprint(folder, fingerprint)
    release = signed(folder, public)
    same_files(folder, release)
    if (folder / files.PUBLIC_KEY).read_bytes() != openssl.plain(public):
        raise ReleaseRefused(f"`{files.PUBLIC_KEY}` is not the key that signed", _AGAIN)
    identity = _identity(folder)
    if (identity.image_id, identity.manifest_digest) != (release.image_id, release.manifest_digest):
        raise ReleaseRefused("the archive holds another image than the release names", _AGAIN)
    with Image(folder / files.ARCHIVE) as image:
        covered(folder, image)
        for document in (_read(folder / files.ADVISORIES), advisories.pinned()):
            found = advisories.below(image.distributions().values(), document)
            if found:
                raise ReleaseRefused("; ".join(found), "ask the vendor for a newer release")
    made(folder, release, public)
    return release


def compare(release: Release, loaded_id: str) -> None:
    """Raise ReleaseRefused unless docker's image is the released one."""
    if loaded_id != release.image_id:
        raise ReleaseRefused("the loaded image is not the one that was released", "load `image.tar` again")


_AGAIN = "get the release again, from the vendor"


def _by_fingerprint(folder: Path, fingerprint: str | None) -> Path:
    public = folder / files.PUBLIC_KEY
    if not public.is_file() or public.is_symlink():
        raise ReleaseRefused(f"`{files.PUBLIC_KEY}` is missing", "give the vendor's key with `--key`")
    if openssl.fingerprint(public) != (fingerprint or "").lower().replace(":", ""):
        raise ReleaseRefused("the key in the release has another fingerprint", "who gave you this release?")
    return public


def signed(folder: Path, public: Path) -> Release:
    """Return the release document once its signature held."""
    document, signature = folder / files.RELEASE, folder / files.SIGNATURE
    for path in (document, signature):
        if not path.is_file() or path.is_symlink() or path.stat().st_size > files.MAX_DOCUMENT_BYTES:
            raise ReleaseRefused(f"`{path.name}` is missing or no plain file", _AGAIN)
    content = document.read_bytes()
    openssl.verify(public, content, signature.read_bytes())
    return files.decode(content)


def same_files(folder: Path, release: Release) -> None:
    """Raise ReleaseRefused for a file that is missing, too many, changed, or none."""
    expected = {*release.files, files.RELEASE, files.SIGNATURE, files.PUBLIC_KEY}
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    for name, path in sorted(there.items()):
        if path.is_symlink() or not path.is_file():
            raise ReleaseRefused(f"`{name!r}` is no plain file", _AGAIN)
    for name in sorted(expected - there.keys()):
        raise ReleaseRefused(f"`{name}` is missing", _AGAIN)
    for name in sorted(there.keys() - expected):
        raise ReleaseRefused(
            f"{name!r} does not belong to the release", "remove it, and ask who put it there"
        )
    for name, wanted in sorted(release.files.items()):
        if files.digest(there[name]) != wanted:
            raise ReleaseRefused(f"`{name}` is not what was signed", _AGAIN)


def covered(folder: Path, image: Image) -> None:
    """Raise ReleaseRefused unless both bills name every component of the image and no other."""
    for name in (files.CYCLONEDX, files.SPDX):
        try:
            found = components.missing(image, bills.purls_of(_read(folder / name)))
        except (components.ComponentsRefused, KeyError, IndexError, TypeError, ValueError) as error:
            raise ReleaseRefused(f"`{name}` cannot be compared with the image", _AGAIN) from error
        if found:
            raise ReleaseRefused(f"`{name}`: {len(found)} differences, the first: {found[0]}", _AGAIN)


def made(folder: Path, release: Release, public: Path) -> None:
    """Raise ReleaseRefused, SigningRefused unless the provenance is of this image, signed by the same key."""
    try:
        said = provenance.open_sealed(
            _read(folder / files.PROVENANCE), lambda text, by: openssl.verify(public, text, by)
        )
        subjects = {one["name"]: one["digest"]["sha256"] for one in said["subject"]}
    except provenance.ProvenanceRefused as error:
        raise ReleaseRefused(str(error), _AGAIN) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseRefused("the provenance is of another form", _AGAIN) from error
    wanted = {"image": release.image_id.removeprefix("sha256:"), "image.tar": release.files[files.ARCHIVE]}
    if subjects != wanted:
        raise ReleaseRefused("the provenance is of another image", _AGAIN)


def _identity(folder: Path) -> archive.Identity:
    try:
        return archive.identify(folder / files.ARCHIVE)
    except (archive.ArchiveRefused, KeyError, OSError, ValueError) as error:
        raise ReleaseRefused("the archive holds no image", _AGAIN) from error


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
