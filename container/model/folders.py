"""A folder of parts made beforehand, wherever it lies: small files, proven files, tensors.

Owns: the Folder protocol and the folder on a disk. A sealed package implements the same protocol (opened).
Must not know: encryption, which parts there are, what a tensor is for.
Invariant: importing it imports no torch: a ready decoder's tensors come as numpy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from container.kernels.memory import empty
from container.model.source import ModelSource, SourceError, file_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from container.model.shape import RunnerConfig

Array = npt.NDArray[Any]
MALFORMED: Final = "a part is not valid safetensors"


class Arrays(Protocol):
    """The tensors of one file, read one at a time."""

    def names(self) -> set[str]:
        """Return the names of all of them."""

    def read(self, name: str, shape: tuple[int, ...], dtypes: Sequence[type[np.generic]]) -> Array | None:
        """Return a copy that begins on a cache line; None where the tensor has another shape or kind."""

    def let_go(self) -> None:
        """Keep nothing resident of what has been read."""


class Folder(Protocol):
    """Named files side by side, and folders of such."""

    def folder(self, name: str) -> Folder:
        """Return a folder of this one, which may be empty."""

    def file(self, name: str, most_bytes: int) -> bytes | None:
        """Return a small file, None where there is none; raises SourceError above `most_bytes`."""

    def proves(self, name: str, sha256: str) -> bool:
        """Return whether the file is there and what `sha256` was taken of."""

    def arrays(self, name: str) -> Arrays:
        """Return the tensors of a file for numpy; raises SourceError."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file for torch, on the CPU; raises SourceError."""


class PlainFolder:
    """A directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def folder(self, name: str) -> PlainFolder:
        return PlainFolder(self._path / name)

    def file(self, name: str, most_bytes: int) -> bytes | None:
        path = self._path / name
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > most_bytes:
                raise SourceError("a part's manifest is too large")
            return path.read_bytes()
        except OSError:
            raise SourceError("a part's manifest cannot be read") from None

    def proves(self, name: str, sha256: str) -> bool:
        path = self._path / name
        return path.is_file() and file_sha256(path) == sha256

    def arrays(self, name: str) -> MappedArrays:
        return MappedArrays(self._path / name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            with safe_open(self._path / name, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            raise SourceError(MALFORMED) from None


class MappedArrays:
    """The tensors of a file that is mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open()

    def names(self) -> set[str]:
        return set(self._file.keys())

    def read(self, name: str, shape: tuple[int, ...], dtypes: Sequence[type[np.generic]]) -> Array | None:
        try:
            stored: Array = self._file.get_tensor(name)
        except (TypeError, SafetensorError):  # a dtype that numpy does not know
            return None
        if stored.dtype not in dtypes or stored.shape != shape:
            return None
        copy = empty(stored.shape, stored.dtype)
        copy[...] = stored
        return copy

    def let_go(self) -> None:
        self._file = self._open()  # the old mapping goes, and its pages with it

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="np")
        except SafetensorError:
            raise SourceError(MALFORMED) from None


def parts_of(config: RunnerConfig, source: ModelSource) -> Folder | None:
    """Return where parts made beforehand lie for a start from `source`, None where nobody says."""
    from container.model.opened import OpenedSource

    if isinstance(source, OpenedSource):
        return source.parts
    return None if config.parts_dir is None else PlainFolder(Path(config.parts_dir))
