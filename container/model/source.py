"""Where a model's files come from: named files and named tensors, and nothing else.

Owns: the ModelSource protocol, the names a source may be asked for, and the source over a plain directory.
Must not know: encryption, transformers, the engine. A sealed package implements the same protocol elsewhere.
Invariant: nothing outside the directory is opened, nothing is executed, nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS: Final = "model.safetensors"
PARTS: Final = "parts"  # folder of parts made beforehand; with it, a directory may lack the weights
WEIGHTS_DIGEST: Final = f"{PARTS}/weights.sha256"  # sealed: of the weights that the parts were made from
NO_WEIGHTS: Final = (
    "there are no unquantized weights, and no parts that were made for these settings\n"
    "hint: choose the ranks and the scheme of the parts, or take a package with the weights in it"
)
ADAPTER: Final = "adapter_config.json"  # of an adapter, as its training writes it
INDEX: Final = "model.safetensors.index.json"
MAX_FILE_BYTES: Final = 256 * 1024 * 1024  # configuration and tokenizer files; the largest known is 35 MB
MAX_SHARDS: Final = 4096
HASHED_BYTES: Final = 16 * 1024 * 1024  # read at once while a file is hashed
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
PICKLED_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


class SourceError(Exception):
    """The model's files are missing, malformed or not allowed; the text names the rule, never content."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint that costs no memory until `read`, and none after its reader lets go of it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor] = field(repr=False)  # on the CPU; raises SourceError


def file_sha256(path: Path) -> str:
    """Return the digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


class ModelSource(Protocol):
    """Hands out a model's files and tensors; whoever implements it decides where they lie."""

    def file(self, name: str) -> bytes | None:
        """Return the file's bytes, or None when the model has no such file."""

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield every (name, tensor not yet read) of the checkpoint once, in any order."""

    def weights_sha256(self) -> str | None:
        """Return what tells these weights from others, in hexadecimal.

        None where there are none, or where parts beside them cannot be of others.
        """


def source_sha256(source: ModelSource) -> str | None:
    """Return what tells the model in `source` from others, None where it has no weights."""
    weights = source.weights_sha256()
    if weights is None:
        return None
    return hashlib.sha256(f"{config_sha256(source)} {weights}".encode()).hexdigest()


def config_sha256(source: ModelSource) -> str:
    return hashlib.sha256(source.file("config.json") or b"").hexdigest()


def read_json(source: ModelSource, name: str) -> dict[str, Any] | None:
    """Return the JSON object in file `name`, or None when the file is absent; raises SourceError."""
    raw = source.file(name)
    if raw is None:
        return None
    try:
        value = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise SourceError(f"`{name}` is not JSON") from None
    if not isinstance(value, dict):
        raise SourceError(f"`{name}` is not a JSON object")
    return value


def shard_names(index: dict[str, Any] | None) -> list[str]:
    """Return the files that hold the weights, by the index where there is one; raises SourceError."""
    if index is None:
        return [WEIGHTS]
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise SourceError(f"`{INDEX}` has no usable `weight_map`")
    names = sorted(set(weights.values()))
    if len(names) > MAX_SHARDS:
        raise SourceError(f"`{INDEX}` names more than {MAX_SHARDS} files")
    return names


class DirectorySource:
    """A Hugging Face style directory with safetensors weights, in one file or sharded by an index.

    Raises SourceError for pickled weights, for a configuration that asks to run code of its own, for names
    that are paths, and for links that leave the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path).resolve()
        if not self._root.is_dir():
            raise SourceError("the model directory does not exist or is not a directory")
        refuse_adapter(self)
        config = read_json(self, "config.json")
        if config is None:
            raise SourceError("the model directory has no `config.json`")
        refuse_remote_code(config)
        self._shards = self._find_shards()

    def file(self, name: str) -> bytes | None:
        path = self._inside(name)
        if path is None:
            return None
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SourceError(f"a model file exceeds {MAX_FILE_BYTES} bytes")
        return path.read_bytes()

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        if not self._shards:
            raise SourceError(NO_WEIGHTS)
        seen: set[str] = set()
        for path in self._shards:
            for name, shape in _shapes(path):
                if name in seen:
                    raise SourceError("a tensor is stored twice")
                seen.add(name)
                yield name, StoredTensor(shape, partial(_read, path, name))

    def weights_sha256(self) -> str | None:
        if not self._shards:
            return None
        files = [(path.name, file_sha256(path)) for path in sorted(self._shards)]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def _find_shards(self) -> list[Path]:
        index = read_json(self, INDEX)
        if index is None and (self._root / PARTS).is_dir() and not (self._root / WEIGHTS).exists():
            return []
        return [self._weights_file(name) for name in shard_names(index)]

    def _weights_file(self, name: str) -> Path:
        if Path(name).suffix in PICKLED_SUFFIXES:
            raise SourceError("pickled weights are not read\nhint: convert them to safetensors")
        if not name.endswith(".safetensors"):
            raise SourceError("a weights file is not safetensors")
        path = self._inside(name)
        if path is not None:
            return path
        if any(entry.suffix in PICKLED_SUFFIXES for entry in self._root.iterdir()):
            raise SourceError("only pickled weights found\nhint: convert them to safetensors")
        raise SourceError("a weights file is missing")

    def _inside(self, name: str) -> Path | None:
        """Return the regular file `name` of the directory, or None; links may not leave the directory."""
        if not PLAIN_NAME.fullmatch(name):
            raise SourceError("a file name holds a path or an odd character")
        path = self._root / name
        if not path.exists():
            return None
        resolved = path.resolve()
        if not resolved.is_relative_to(self._root):
            raise SourceError("a link leaves the model directory")
        if not resolved.is_file():
            raise SourceError("a model file is not a regular file")
        return resolved


def _shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape) of every tensor in a safetensors file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            return [(name, tuple(shard.get_slice(name).get_shape())) for name in shard.keys()]  # noqa: SIM118
    except SafetensorError:
        raise SourceError("a weights file is not valid safetensors") from None


def _read(path: Path, name: str) -> Tensor:
    """Return one tensor as a view of a mapping of its own.

    A mapping shared by all tensors would keep every page resident that any of them touched, until the last
    one is gone; this one goes with its tensor.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor
    except SafetensorError:
        raise SourceError("a weights file is not valid safetensors") from None


def refuse_adapter(source: ModelSource) -> None:
    """Raise SourceError where an adapter lies with the model: the model alone is another model."""
    if source.file(ADAPTER) is not None:
        raise SourceError(
            f"there is an adapter (`{ADAPTER}`), and adapters are not served\n"
            "hint: merge it into the weights, or take its files away"
        )


def refuse_remote_code(config: dict[str, Any]) -> None:
    """Raise SourceError when `config`, at any depth, names code to be loaded beside the weights."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("auto_map") or value.get("custom_pipelines") or value.get("trust_remote_code"):
                raise SourceError("the configuration asks to run code of its own (`auto_map`)")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
