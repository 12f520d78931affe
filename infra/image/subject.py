"""An image as a checker sees it: its configuration, every entry of every layer, the files that result.

Owns: reading a saved image. Must not know: what is right or wrong about it.
Invariant: nothing of the image is executed or extracted to disk; contents are read from the archive.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

WHITEOUT: Final = ".wh."
SITE: Final = "opt/strongroom/lib/python3.11/site-packages"
DISTRIBUTION: Final = re.compile(rf"{re.escape(SITE)}/[^/]+\.dist-info/METADATA$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of one layer; `path` has no leading slash."""

    path: str
    layer: int
    member: tarfile.TarInfo

    @property
    def is_file(self) -> bool:
        return self.member.isreg()

    @property
    def mode(self) -> int:
        return self.member.mode & 0o7777


class Image:
    """A saved image. Use it as a context."""

    def __init__(self, saved: Path) -> None:
        """Open the archive that `docker save` wrote; raises OSError, KeyError, tarfile.TarError."""
        self._archive = tarfile.open(saved)  # noqa: SIM115  closed in __exit__
        described = json.loads(self._read("manifest.json"))[0]
        self.document: dict[str, Any] = json.loads(self._read(described["Config"]))
        self.config: dict[str, Any] = self.document["config"]
        self._layers = [self._layer(name) for name in described["Layers"]]
        self.entries = [
            Entry(posixpath.normpath(member.name), number, member)
            for number, layer in enumerate(self._layers)
            for member in layer.getmembers()
        ]
        self.final = self._final()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.close()
        self._archive.close()

    def files(self) -> Iterator[Entry]:
        """Yield the regular files of the result."""
        return (entry for entry in self.final.values() if entry.is_file)

    def content(self, entry: Entry) -> bytes:
        """Return the bytes of a regular file."""
        opened = self._layers[entry.layer].extractfile(entry.member)
        assert opened is not None, "a regular file has contents"
        return opened.read()

    def text(self, path: str) -> str:
        """Return a file of the result as text, or "" when there is none."""
        entry = self.final.get(path.lstrip("/"))
        return "" if entry is None or not entry.is_file else self.content(entry).decode("utf-8", "replace")

    def env(self) -> dict[str, str]:
        """Return the environment that the configuration sets."""
        return dict(pair.split("=", 1) for pair in self.config.get("Env") or ())

    def labels(self) -> dict[str, str]:
        return dict(self.config.get("Labels") or {})

    def distributions(self) -> dict[str, str]:
        """Return what is installed: folder of its metadata -> name==version."""
        found = {}
        for path in self.final:
            if DISTRIBUTION.match(path):  # not what one package carries of another inside itself
                fields = self.metadata(path)
                found[posixpath.dirname(path)] = f"{fields['Name'][0]}=={fields['Version'][0]}"
        return found

    def metadata(self, path: str) -> dict[str, list[str]]:
        """Return the header of a METADATA file: field -> values."""
        fields: dict[str, list[str]] = {}
        for line in self.text(path).split("\n\n", 1)[0].splitlines():
            name, colon, value = line.partition(": ")
            if colon and not line.startswith((" ", "\t")):
                fields.setdefault(name, []).append(value.strip())
        return fields

    def _final(self) -> dict[str, Entry]:
        result: dict[str, Entry] = {}
        for entry in self.entries:
            folder, name = posixpath.split(entry.path)
            if name.startswith(WHITEOUT):
                gone = posixpath.join(folder, name.removeprefix(WHITEOUT))
                for path in [p for p in result if p == gone or p.startswith(gone + "/")]:
                    del result[path]
            else:
                result[entry.path] = entry
        return result

    def _layer(self, name: str) -> tarfile.TarFile:
        member = self._archive.getmember(name)
        if member.issym():
            member = self._archive.getmember(posixpath.normpath(posixpath.join(name, "..", member.linkname)))
        return tarfile.open(fileobj=self._archive.extractfile(member))

    def _read(self, name: str) -> bytes:
        opened = self._archive.extractfile(name)
        assert opened is not None, "docker writes files"
        return opened.read()
