"""What is in a package, and in what two packages differ, in numbers and file names.

Owns: those two descriptions. Must not know: keys, how they are shown.
Invariant: no tensor's name and no content is part of a description.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Final

from model_package.layout import Kind
from model_package.manifest import Manifest
from model_package.opener import Contents

PART_BYTES: Final = 8 << 20
_FIELDS: Final = (
    "owner",
    "epoch",
    "min_loader",
    "created_s",
    "package_id",
    "content_sha256",
    "base",
    "model",
)


@dataclass(frozen=True, slots=True)
class FileDifference:
    """How one file of both packages differs; tensors by number."""

    name: str
    same: int
    changed: int
    only_first: int
    only_second: int


@dataclass(frozen=True, slots=True)
class Difference:
    """In what two packages differ. `files` is None where there was no key to look inside."""

    fields: tuple[str, ...]
    recipients: bool
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    files: tuple[FileDifference, ...] | None

    @property
    def same_content(self) -> bool:
        """True when both unseal to the same files; False also where nobody could look."""
        return not self.only_first and not self.only_second and self.files == ()


def difference(
    first: Manifest, second: Manifest, contents: tuple[Contents, Contents] | None = None
) -> Difference:
    """Return in what two packages differ; what their files hold only with the `contents` of both.

    Raises PackageError.
    """
    fields = tuple(name for name in _FIELDS if getattr(first, name) != getattr(second, name))
    names, others = ({entry.name for entry in each.files} for each in (first, second))
    differing = None
    if contents is not None:
        looked = (_file(name, *contents) for name in sorted(names & others))
        differing = tuple(each for each in looked if each is not None)
    return Difference(
        fields,
        first.recipients != second.recipients,
        tuple(sorted(names - others)),
        tuple(sorted(others - names)),
        differing,
    )


def tensor_counts(contents: Contents) -> dict[str, dict[str, int]]:
    """Return file -> dtype -> number of tensors."""
    return {
        name: dict(sorted(Counter(tensor.dtype for tensor in contents.tensors(name)).items()))
        for name in contents.names(Kind.TENSORS)
    }


def _file(name: str, first: Contents, second: Contents) -> FileDifference | None:
    one, other = _digests(name, first), _digests(name, second)
    both = one.keys() & other.keys()
    same = sum(one[each] == other[each] for each in both)
    if len(one) == len(other) == same:
        return None
    return FileDifference(name, same, len(both) - same, len(one) - len(both), len(other) - len(both))


def _digests(name: str, contents: Contents) -> dict[str, bytes]:
    """Return a digest of the header and of every tensor, by name; a blob has one, under no name."""
    tensors = name in contents.names(Kind.TENSORS)
    parts = list(contents.tensors(name)) if tensors else [contents.blob(name)]
    found = {}
    memory = memoryview(bytearray(PART_BYTES))
    for part in parts:
        digest = hashlib.sha256(repr((part.dtype, part.shape)).encode())
        for start in range(0, part.data_bytes, PART_BYTES):
            piece = memory[: min(PART_BYTES, part.data_bytes - start)]
            part.read_range(start, piece)
            digest.update(piece)
        found[part.name] = digest.digest()
    return found
