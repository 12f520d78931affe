"""What an image's bytes are: every part of 50 MB or more by name, the rest in groups.

Owns: the division into parts. Must not know: limits (the checks hold them).
Invariant: the parts add up to the whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

from infra.image.subject import SITE, Entry

NAMED_BYTES: Final = 50_000_000
BYTE_CODE: Final = "byte code, so that a start compiles nothing"
SMALL: Final = "packages below 50 MB each"
GROUPS: Final = (
    (re.compile(r"/__pycache__/"), BYTE_CODE),
    (re.compile(rf"^{SITE}/(container|sagemaker_entry|model_package|strongroom-[^/]*)/"), "our own code"),
    (re.compile(r"^usr/lib/python3"), "Python's standard library"),
    (re.compile(r"^usr/lib/"), "the system's libraries"),
)


def parts(entries: Iterable[Entry]) -> dict[str, int]:
    """Return part -> bytes, largest first."""
    sizes: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    for entry in entries:
        if not entry.is_file:
            continue
        group = next((name for pattern, name in GROUPS if pattern.search(entry.path)), None)
        if group is not None:
            sizes[group] += entry.member.size
        elif entry.path.startswith(f"{SITE}/"):
            packages[_package(entry.path)] += entry.member.size
        else:
            sizes["everything else"] += entry.member.size
    for name, size_bytes in packages.items():
        sizes[name if size_bytes >= NAMED_BYTES else SMALL] += size_bytes
    return dict(sizes.most_common())


def _package(path: str) -> str:
    """The package a file belongs to; its largest library stands by itself."""
    name = path.removeprefix(f"{SITE}/").split("/")[0]
    return f"{name}: {path.rsplit('/', 1)[1]}" if path.endswith("libtorch_cpu.so") else name
