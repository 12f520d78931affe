"""A tiny image that passes every check of a saved one, and ways to put one fault into it."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.image.checks.packages import COMPONENTS
from infra.image.subject import SITE
from infra.image.wheelhouse import Locked

EPOCH_S = 1_700_000_000
CREATED = "2023-11-14T22:13:20Z"
PACKAGE = f"{SITE}/flask-3.1.3.dist-info"
LABELS = {
    **{f"org.opencontainers.image.{name}": "1" for name in ("version", "revision", "licenses")},
    "org.opencontainers.image.created": CREATED,
    "org.opencontainers.image.base.digest": "sha256:" + "a" * 64,
    "strongroom.variant": "cpu",
}
LOCK = (Locked("flask", "3.1.3", frozenset({"0" * 64})),)


@dataclass
class File:
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    link: str = ""
    folder: bool = False
    mtime: int = EPOCH_S
    attributes: dict[str, str] = field(default_factory=dict)

    def member(self, name: str) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.mode, member.uid, member.mtime = self.mode, self.uid, self.mtime
        member.size = len(self.content)
        member.type = tarfile.DIRTYPE if self.folder else tarfile.SYMTYPE if self.link else tarfile.REGTYPE
        member.linkname = self.link
        member.pax_headers = self.attributes
        return member


class TinyImage:
    """What is written by `save`; tests change `config`, `files` or `document` before."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {
            "User": "10001:10001",
            "Entrypoint": ["/opt/strongroom/bin/python", "-I", "-B", "-X", "utf8", "-m", "sagemaker_entry"],
            "Healthcheck": {"Test": ["NONE"]},
            "ExposedPorts": {"8080/tcp": {}},
            "Env": ["PYTHONDONTWRITEBYTECODE=1", "PATH=/opt/strongroom/bin"],
            "Labels": copy.deepcopy(LABELS),
        }
        self.document: dict[str, Any] = {
            "architecture": "amd64",
            "os": "linux",
            "created": CREATED,
            "history": [{"created_by": "COPY dir:" + "b" * 64 + " in /", "created": CREATED}],
        }
        self.files: dict[str, File] = {
            "etc/passwd": File(b"root:x:0:0:::\nstrongroom:x:10001:10001:::\n"),
            "etc/group": File(b"root:x:0:\nstrongroom:x:10001:\n"),
            "tmp": File(mode=0o1777, folder=True),
            "usr/bin/python3.11": File(b"\x7fELF", 0o755),
            "opt/strongroom/bin/python": File(link="/usr/bin/python3.11", mode=0o777),
            "usr/share/doc/python3.11/copyright": File(b"PSF"),
            "usr/share/doc/strongroom/LICENSE": File(b"Apache"),
            f"{SITE}/flask/__init__.py": File(b"code"),
            f"{PACKAGE}/METADATA": File(b"Name: Flask\nVersion: 3.1.3\nLicense: BSD\n\nAbout it"),
        }
        self.components: dict[str, Any] = {
            "variant": "cpu",
            "debian": {"python3.11": {"version": "3.11", "files": ["/usr/bin/python3.11"]}},
            "python": ["flask-3.1.3"],
        }
        self.other_layers: list[dict[str, File]] = []
        self.finish: list[Callable[[], None]] = []

    def record(self) -> None:
        """Write the package's RECORD over what is there now."""
        names = (f"{SITE}/flask/__init__.py", f"{PACKAGE}/METADATA")
        lines = [
            f"{name.removeprefix(SITE + '/')},sha256={_hash(self.files[name].content)},4" for name in names
        ]
        self.files[f"{PACKAGE}/RECORD"] = File("\n".join(lines).encode())

    def save(self, path: Path) -> Path:
        self.record()
        self.files[COMPONENTS] = File(json.dumps(self.components).encode())
        for change in self.finish:
            change()
        layers = [layer_tar(one) for one in (self.files, *self.other_layers)]
        digests = ["sha256:" + hashlib.sha256(one).hexdigest() for one in layers]
        config = self.document | {"config": self.config, "rootfs": {"type": "layers", "diff_ids": digests}}
        names = [f"{number}/layer.tar" for number in range(len(layers))]
        manifest = [{"Config": "config.json", "RepoTags": ["tiny:1"], "Layers": names}]
        parts = {"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
        with tarfile.open(path, "w") as archive:
            for name, content in (parts | dict(zip(names, layers, strict=True))).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path


def layer_tar(files: dict[str, File]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as layer:
        for name, one in files.items():
            layer.addfile(one.member(name), io.BytesIO(one.content))
    return written.getvalue()


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
