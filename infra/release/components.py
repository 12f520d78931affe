"""What an image is made of: every Python distribution and every Debian package in it, once each.

Owns: the list, the names that tools know the parts by. Must not know: forms of a bill of materials.
Invariant: the list depends on the image alone; a distribution or a file of the system that belongs to no
component raises, so that a bill can never leave one out in silence.

Package URLs: https://github.com/package-url/purl-spec, types `pypi` and `deb`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from infra.image.checks.packages import COMPONENTS, WRITTEN
from infra.image.subject import SITE, Image

SUITE: Final = "debian-12"
EXPRESSION: Final = re.compile(r"[A-Za-z0-9.+() -]+")


class ComponentsRefused(Exception):
    """Something is in the image that no component accounts for."""


@dataclass(frozen=True, slots=True)
class Component:
    """One part. `content_sha256` is over what it installed, as its own record or the build's list says."""

    kind: str  # "pypi" or "deb"
    name: str
    version: str
    purl: str
    licence: str | None  # an SPDX expression, where the part says one
    licence_text: str | None  # what it says otherwise
    content_sha256: str


def components(image: Image) -> tuple[Component, ...]:
    """Return every component of `image`, ordered by purl; raises ComponentsRefused."""
    found = [*_python(image), *_debian(image)]
    return tuple(sorted(found, key=lambda one: one.purl))


def _python(image: Image) -> list[Component]:
    made = []
    for folder, text in image.distributions().items():
        name, _, version = text.partition("==")
        fields = image.metadata(f"{folder}/METADATA")
        expression = next(iter(fields.get("License-Expression", ())), None)
        said = [one.rpartition(" :: ")[2] for one in fields.get("Classifier", ()) if "License ::" in one]
        said += [line for line in fields.get("License", ()) if len(line) <= 80]
        purl = f"pkg:pypi/{_plain(name)}@{quote(version, safe='')}"
        record = image.text(f"{folder}/RECORD").encode()
        licence = expression if expression and EXPRESSION.fullmatch(expression) else None
        text_of = None if licence else "; ".join(said) or None
        digest = hashlib.sha256(record).hexdigest()
        made.append(Component("pypi", _plain(name), version, purl, licence, text_of, digest))
    owned = {folder.rpartition("/")[2] for folder in image.distributions()}
    strays = {
        path.removeprefix(f"{SITE}/").split("/")[0]
        for path in image.final
        if path.startswith(f"{SITE}/") and path.count("/") == SITE.count("/") + 2 and ".dist-info/" in path
    }
    if strays - owned:
        raise ComponentsRefused(f"no metadata in {', '.join(sorted(strays - owned))}")
    return made


def _debian(image: Image) -> list[Component]:
    listed = json.loads(image.text(COMPONENTS) or '{"debian": {}}')["debian"]
    machine = str(image.document.get("architecture", ""))
    files = {path.lstrip("/") for entry in listed.values() for path in entry["files"]}
    strays = [
        entry.path
        for entry in image.files()
        if entry.path not in files and not WRITTEN.search(entry.path) and "__pycache__" not in entry.path
    ]
    if strays:
        raise ComponentsRefused(f"{len(strays)} files are no component's, the first is `{strays[0]}`")
    made = []
    for name, entry in listed.items():
        digest = hashlib.sha256()
        for path in sorted(entry["files"]):
            held = image.final.get(path.lstrip("/"))
            if held is None:
                raise ComponentsRefused(f"`{path}` is listed and not there")
            digest.update(f"{path}\0".encode() + hashlib.sha256(image.content(held)).digest())
        version = str(entry["version"])
        purl = (
            f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}?arch={machine}&distro={SUITE}"
        )
        made.append(Component("deb", name, version, purl, None, None, digest.hexdigest()))
    return made


def missing(image: Image, purls: set[str]) -> list[str]:
    """Return how a bill that names `purls` differs from `image`, both ways."""
    there = {component.purl for component in components(image)}
    return [f"not in the bill: {purl}" for purl in sorted(there - purls)] + [
        f"in the bill, not in the image: {purl}" for purl in sorted(purls - there)
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
