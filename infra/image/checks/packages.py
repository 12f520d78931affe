"""Checks 20 to 24, 28 and 29: installed packages against the lock, their records, licences and advisories.

Owns: these checks, the floors of advisories. Must not know: containers.
Invariant: see table.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from infra.image import advisories
from infra.image.checks.table import Findings, Table
from infra.image.subject import SITE, Image
from infra.image.wheelhouse import Locked

COMPONENTS: Final = "usr/share/strongroom/components.json"
OWN: Final = "strongroom"
TELEMETRY: Final = {
    "posthog",
    "sentry-sdk",
    "analytics-python",
    "segment-analytics-python",
    "wandb",
    "mlflow",
}
TELEMETRY_PREFIXES: Final = ("opentelemetry-exporter", "datadog", "ddtrace", "newrelic", "comet-ml", "scarf")
UNLISTED: Final = re.compile(r"(^|/)__pycache__/|\.dist-info/(RECORD|INSTALLER|REQUESTED|direct_url\.json)$")
# What the build writes itself; everything else of the base layer came with a Debian package.
WRITTEN: Final = re.compile(
    rf"^(etc/(passwd|group|nsswitch\.conf)|{COMPONENTS}|usr/share/doc/.*|opt/strongroom/pyvenv\.cfg)$"
    r"|^opt/strongroom/(bin/|lib/)"
)


@dataclass(frozen=True, slots=True)
class Installed:
    """An image beside the lock that it was built from."""

    image: Image
    lock: tuple[Locked, ...]


TABLE: Final = Table[Installed]()


@TABLE.check(20, "the list of components is what is there, both ways")
def components(subject: Installed) -> Findings:
    image = subject.image
    listed = json.loads(image.text(COMPONENTS) or "{}")
    if not listed:
        return ["there is no list"]
    debian = {path.lstrip("/") for entry in listed["debian"].values() for path in entry["files"]}
    there = {e.path for e in image.files() if not WRITTEN.search(e.path) and "__pycache__" not in e.path}
    wheels = set(listed["python"])
    present = {posixpath.basename(p).removesuffix(".dist-info") for p in image.distributions()}
    present = {name for name in present if not name.startswith(f"{OWN}-")}
    return (
        [f"not listed: {path}" for path in sorted(there - debian)]
        + [f"listed, not there: {path}" for path in sorted(debian - set(image.final))]
        + [f"package not listed: {name}" for name in sorted(present - wheels)]
        + [f"package listed, not there: {name}" for name in sorted(wheels - present)]
    )


@TABLE.check(21, "every package is the locked one, and none lacks another")
def locked(subject: Installed) -> Findings:
    pinned = {one.name: one.version for one in subject.lock}
    found = []
    names = {}
    for folder, text in subject.image.distributions().items():
        name, _, version = text.partition("==")
        names[_plain(name)] = folder
        if _plain(name) != OWN and pinned.get(_plain(name)) != version:
            found.append(f"`{text}` is not in the lock")
    found += [f"`{name}` is locked and missing" for name in pinned if name not in names]
    for name, folder in names.items():
        for needed in subject.image.metadata(f"{folder}/METADATA").get("Requires-Dist", ()):
            if ";" not in needed and _plain(re.split(r"[^A-Za-z0-9._-]", needed)[0]) not in names:
                found.append(f"`{name}` needs `{needed}`")
    return found


@TABLE.check(22, "every installed file has the hash its package recorded, and no file is without one")
def records(subject: Installed) -> Findings:
    image = subject.image
    recorded = {path: digest for folder in image.distributions() for path, digest in _record(image, folder)}
    found = []
    for path, digest in recorded.items():
        entry = image.final.get(path)
        if entry is None:
            found.append(f"missing: {path}")
        elif digest and not UNLISTED.search(path) and _digest(image.content(entry)) != digest:
            found.append(f"changed: {path}")
    for entry in image.files():
        inside = entry.path.startswith(f"{SITE}/") and not UNLISTED.search(entry.path)
        if inside and entry.path not in recorded:
            found.append(f"nobody's: {entry.path}")
    return found


@TABLE.check(23, "no start-up hook of Python's")
def hooks(subject: Installed) -> Findings:
    names = ("sitecustomize.py", "usercustomize.py")
    return [
        entry.path
        for entry in subject.image.files()
        if posixpath.basename(entry.path) in names
        or (entry.path.endswith(".pth") and re.search(r"^\s*import\b", subject.image.text(entry.path), re.M))
    ]


@TABLE.check(24, "no library that reports home")
def telemetry(subject: Installed) -> Findings:
    names = [_plain(text.partition("==")[0]) for text in subject.image.distributions().values()]
    return [name for name in names if name in TELEMETRY or name.startswith(TELEMETRY_PREFIXES)]


@TABLE.check(28, "every component brings its licence")
def licences(subject: Installed) -> Findings:
    image = subject.image
    found = [] if image.text("usr/share/doc/strongroom/LICENSE") else ["our own licence is missing"]
    for name in json.loads(image.text(COMPONENTS) or "{}").get("debian", ()):
        if f"usr/share/doc/{name}/copyright" not in image.final:
            found.append(f"`{name}` has no copyright file")
    for folder, text in image.distributions().items():
        fields = image.metadata(f"{folder}/METADATA")
        said = any("License ::" in one for one in fields.get("Classifier", ()))
        if not (
            said or fields.get("License") or fields.get("License-Expression") or fields.get("License-File")
        ):
            found.append(f"`{text}` says no licence")
    return found


@TABLE.check(29, "no package is older than its advisories allow")
def floors(subject: Installed) -> Findings:
    return advisories.below(subject.image.distributions().values(), advisories.pinned())


def _record(image: Image, folder: str) -> Iterator[tuple[str, str]]:
    """Yield path and recorded SHA-256 ("" for none) of every file of a package."""
    for line in image.text(f"{folder}/RECORD").splitlines():
        name, digest, _ = line.rsplit(",", 2)
        yield posixpath.normpath(posixpath.join(SITE, name.strip('"'))), digest.removeprefix("sha256=")


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
