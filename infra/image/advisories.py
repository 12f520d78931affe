"""The pinned advisories: for every package that had a known hole, the lowest version without it.

Owns: the reading of advisories.json, the comparison of versions. Must not know: where versions come from.
Invariant: a version that cannot be compared counts as below; the file decides alone, no network is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

PINNED: Final = Path(__file__).with_name("advisories.json")
NUMBERS: Final = re.compile(r"\d+(?:\.\d+)*")


def pinned() -> dict[str, Any]:
    """Return the document as it is kept beside this file."""
    document: dict[str, Any] = json.loads(PINNED.read_text(encoding="utf-8"))
    return document


def below(installed: Iterable[str], document: Mapping[str, Any]) -> list[str]:
    """Return a finding for every NAME==VERSION that is below its floor."""
    found = []
    for text in installed:
        name, _, version = text.partition("==")
        entry = document["packages"].get(re.sub(r"[-_.]+", "-", name).lower())
        if entry is not None and not _reaches(version, entry["floor"]):
            ids = ", ".join(entry["ids"]) or entry["why"]
            found.append(f"`{text}` is below {entry['floor']} ({ids})")
    return found


def _reaches(version: str, floor: str) -> bool:
    # 2.10.0rc1 comes before 2.10.0: what follows the numbers must be a local or post release
    release = NUMBERS.match(version)
    if release is None or not re.fullmatch(r"(\.post\d+)?(\+.*)?", version[release.end() :]):
        return False
    return _parts(release[0]) >= _parts(floor)


def _parts(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)
