"""Image archives, as `docker save` writes them, made the same whenever their contents are.

Owns: the archive's layout, the rewriting of what differs from build to build, the digests.
Must not know: Docker's daemon, what is inside the layers beyond names, modes and times.
Invariant: the result depends on the files, their modes and links, and the image's configuration; not on when,
where or by which builder it was made. A file capability or another attribute that tar's own fields do not
hold raises, since it would be lost.

`docker build` stamps times into layers, configuration and history, and no option of the versions in use turns
that off; so the archive is rewritten afterwards: https://reproducible-builds.org/docs/source-date-epoch.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

CHUNK_BYTES: Final = 1024 * 1024
CONTENT_HASH: Final = re.compile(r"\b(dir|file|multi):[0-9a-f]{64}\b")
KEPT: Final = ("architecture", "os", "variant")  # of the configuration's outer part
DROPPED: Final = ("Hostname", "Domainname", "Image", "OnBuild", "AttachStdin", "AttachStdout", "AttachStderr")
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"


class ArchiveRefused(Exception):
    """The archive holds what cannot be written the same again."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as written: its digest and sizes in bytes."""

    digest: str
    archive_bytes: int
    content_bytes: int


@dataclass(frozen=True, slots=True)
class Identity:
    """What an image is called by its contents."""

    image_id: str  # sha256 of the configuration: docker's own name for it
    manifest_digest: str  # sha256 of the OCI manifest over uncompressed layers
    layers: tuple[Layer, ...]

    @property
    def content_bytes(self) -> int:
        """The unpacked size, a file that two layers hold counted twice."""
        return sum(layer.content_bytes for layer in self.layers)


def normalise(source: Path, target: Path, tag: str, epoch_s: int) -> Identity:
    """Rewrite the saved image `source` to `target`, named `tag`; raises ArchiveRefused."""
    with tarfile.open(source) as saved:
        described = json.loads(_read(saved, "manifest.json"))
        if len(described) != 1:
            raise ArchiveRefused(f"the archive holds {len(described)} images")
        config = json.loads(_read(saved, described[0]["Config"]))
        work = target.with_suffix(".layers")
        work.mkdir()
        layers = [
            _rewrite(_member(saved, name), work / str(number), epoch_s)
            for number, name in enumerate(described[0]["Layers"])
        ]
    return _write(target, work, tag, plain_config(config, [one.digest for one in layers], epoch_s), layers)


def from_root(root: Path, target: Path, tag: str, architecture: str, epoch_s: int) -> Identity:
    """Write an image of one layer, the tar file `root`, to `target`; for a base that no registry gave."""
    work = target.with_suffix(".layers")
    work.mkdir()
    with root.open("rb") as source:
        layers = [_rewrite(source, work / "0", epoch_s)]
    config = {"architecture": architecture, "os": "linux", "config": {}, "history": []}
    return _write(target, work, tag, plain_config(config, [layers[0].digest], epoch_s), layers)


def plain_config(config: dict[str, Any], digests: Sequence[str], epoch_s: int) -> bytes:
    """Return the image configuration without what differs from build to build."""
    created = datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    inner = {name: value for name, value in config["config"].items() if name not in DROPPED}
    history = [
        {
            "created": created,
            "created_by": CONTENT_HASH.sub(r"\1", entry.get("created_by", "")),
            **({"empty_layer": True} if entry.get("empty_layer") else {}),
        }
        for entry in config.get("history", ())
    ]
    document = {name: config[name] for name in KEPT if name in config} | {
        "created": created,
        "config": inner,
        "rootfs": {"type": "layers", "diff_ids": list(digests)},
        "history": history,
    }
    return _canonical(document)


def identify(saved: Path) -> Identity:
    """Return what the image in an archive is called by its contents, computed from them alone.

    Raises ArchiveRefused where a layer is not the one that the configuration names.
    """
    with tarfile.open(saved) as archive:
        described = json.loads(_read(archive, "manifest.json"))
        if len(described) != 1:
            raise ArchiveRefused(f"the archive holds {len(described)} images")
        config = _read(archive, described[0]["Config"])
        layers = [_measure(archive, name) for name in described[0]["Layers"]]
    if json.loads(config)["rootfs"]["diff_ids"] != [layer.digest for layer in layers]:
        raise ArchiveRefused("a layer is not the one that the configuration names")
    return _identity(config, layers)


def _measure(archive: tarfile.TarFile, name: str) -> Layer:
    opened = _member(archive, name)
    digest, size_bytes = hashlib.sha256(), 0
    while piece := opened.read(CHUNK_BYTES):
        digest.update(piece)
        size_bytes += len(piece)
    with tarfile.open(fileobj=_member(archive, name)) as layer:
        content_bytes = sum(member.size for member in layer if member.isreg())
    return Layer(f"sha256:{digest.hexdigest()}", size_bytes, content_bytes)


def _identity(config: bytes, layers: Sequence[Layer]) -> Identity:
    image_id = "sha256:" + hashlib.sha256(config).hexdigest()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": image_id, "size": len(config)},
        "layers": [{"mediaType": LAYER_TYPE, "digest": x.digest, "size": x.archive_bytes} for x in layers],
    }
    return Identity(image_id, "sha256:" + hashlib.sha256(_canonical(manifest)).hexdigest(), tuple(layers))


def _write(target: Path, work: Path, tag: str, config: bytes, layers: Sequence[Layer]) -> Identity:
    identity = _identity(config, layers)
    image_id = identity.image_id
    names = [f"{layer.digest.removeprefix('sha256:')}.tar" for layer in layers]
    config_name = f"{image_id.removeprefix('sha256:')}.json"
    described = [{"Config": config_name, "RepoTags": [tag], "Layers": names}]
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as written:
        for name, content in ((config_name, config), ("manifest.json", _canonical(described))):
            _add(written, name, io.BytesIO(content), len(content))
        for number, name in enumerate(names):
            path = work / str(number)
            if name not in names[:number]:  # the same layer twice is one file
                with path.open("rb") as layer:
                    _add(written, name, layer, path.stat().st_size)
            path.unlink()
    work.rmdir()
    return identity


def _rewrite(source: IO[bytes], target: Path, epoch_s: int) -> Layer:
    """Write a layer's entries in the order of their names, with one time and without names of users."""
    with tarfile.open(fileobj=source) as old, tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as new:
        content_bytes = 0
        for member in sorted(old.getmembers(), key=lambda one: (one.islnk(), one.name)):
            strange = [name for name in member.pax_headers if name.startswith("SCHILY.xattr")]
            if strange:
                raise ArchiveRefused(f"`{member.name}` has attributes that tar cannot hold: {strange}")
            member.mtime = epoch_s
            member.uname = member.gname = ""
            member.pax_headers = {}
            content_bytes += member.size if member.isreg() else 0
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    with target.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    return Layer(f"sha256:{digest}", target.stat().st_size, content_bytes)


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes], size_bytes: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    entry.mode = 0o644
    archive.addfile(entry, content)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    return _member(archive, name).read()


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = archive.getmember(name)
    if found.issym():  # a layer that several images share
        found = archive.getmember(posixpath.normpath(posixpath.join(posixpath.dirname(name), found.linkname)))
    opened = archive.extractfile(found)
    if opened is None:
        raise ArchiveRefused(f"`{name}` is no file")
    return opened


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
