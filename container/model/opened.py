"""A model that somebody opens for us: files and tensors written straight into our memory.

Owns: the Opener protocol, the model source and the folder of parts over it.
Must not know: what was opened or how (a sealed package comes in as an Opener), keys, paths.
Invariant: a tensor's bytes go into the memory it is used from and nowhere else; importing this imports no
torch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import numpy as np

from container.kernels.memory import empty
from container.model.folders import Array
from container.model.source import (
    INDEX,
    NO_WEIGHTS,
    PARTS,
    PICKLED_SUFFIXES,
    WEIGHTS,
    WEIGHTS_DIGEST,
    SourceError,
    StoredTensor,
    read_json,
    refuse_adapter,
    refuse_remote_code,
    shard_names,
)

if TYPE_CHECKING:
    from torch import Tensor

Answer = TypeVar("Answer")
# safetensors' names for them; torch's attribute names, looked up when a tensor is read.
TORCH: Final = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "I16": "int16",
        "U16": "uint16",
        "I32": "int32",
        "U32": "uint32",
        "I64": "int64",
        "U64": "uint64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }
)
NUMPY: Final = MappingProxyType(
    {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}
)


SHA256: Final = re.compile(rb"[0-9a-f]{64}")


class Unopened(SourceError):
    """The opener refused; the text is its own, for the operator."""


class OpenedTensor(Protocol):
    """A tensor that costs no memory until it is read."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """As safetensors writes it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def data_bytes(self) -> int: ...
    def read_into(self, memory: memoryview) -> None:
        """Write the tensor into `memory`, `data_bytes` long; raises what the opener `refuses` with."""


class Opener(Protocol):
    """Names to bytes: what an opened package offers."""

    @property
    def refuses(self) -> type[Exception]:
        """What its methods raise, with a text for the operator that names no tensor."""

    def file(self, name: str) -> bytes | None:
        """Return a file that holds no tensors, None where there is none of this name."""

    def tensor_files(self) -> Iterable[str]:
        """Return the names of all files that hold tensors."""

    def tensors(self, name: str) -> Iterator[OpenedTensor]:
        """Yield the tensors of such a file."""


class OpenedSource:
    """The model source over an opener; raises as DirectorySource does, and Unopened for the opener."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        refuse_adapter(self)
        config = read_json(self, "config.json")
        if config is None:
            raise SourceError("the model has no `config.json`")
        refuse_remote_code(config)
        self._shards = self._find_shards()

    @property
    def parts(self) -> OpenedFolder:
        """The folder of parts made beforehand, which may be empty."""
        return OpenedFolder(self._opener, f"{PARTS}/")

    def file(self, name: str) -> bytes | None:
        return _asked(self._opener, lambda: self._opener.file(name))

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        if not self._shards:
            raise SourceError(NO_WEIGHTS)
        seen: set[str] = set()
        for file in self._shards:
            for tensor in self._opener.tensors(file):
                if tensor.name in seen:
                    raise SourceError("a tensor is stored twice")
                seen.add(tensor.name)
                read = functools.partial(_torch, self._opener, tensor)
                yield tensor.name, StoredTensor(tensor.shape, read)

    def weights_sha256(self) -> str | None:
        """Return the digest that was sealed beside the parts; None where there is none.

        The weights are not opened for it: whoever signed the package compared them (see belonging).
        """
        raw = self.file(WEIGHTS_DIGEST)
        if raw is None:
            return None
        if not SHA256.fullmatch(raw):
            raise SourceError("the digest of the weights is malformed")
        return raw.decode()

    def _find_shards(self) -> list[str]:
        there = set(self._opener.tensor_files())
        index = read_json(self, INDEX)
        if index is None and WEIGHTS not in there and any(name.startswith(f"{PARTS}/") for name in there):
            return []
        names = shard_names(index)
        if any(name not in there for name in names):
            pickled = any(name.endswith(tuple(PICKLED_SUFFIXES)) for name in names)
            raise SourceError("pickled weights are not read" if pickled else "a weights file is missing")
        return names


class OpenedFolder:
    """A folder of parts over an opener: every byte of it is proven when it is read."""

    def __init__(self, opener: Opener, prefix: str) -> None:
        self._opener = opener
        self._prefix = prefix

    def folder(self, name: str) -> OpenedFolder:
        return OpenedFolder(self._opener, f"{self._prefix}{name}/")

    def file(self, name: str, most_bytes: int) -> bytes | None:
        content = _asked(self._opener, lambda: self._opener.file(self._prefix + name))
        if content is not None and len(content) > most_bytes:
            raise SourceError("a part's manifest is too large")
        return content

    def proves(self, name: str, sha256: str) -> bool:  # noqa: ARG002 - the opener proves what it hands out
        return self._prefix + name in set(self._opener.tensor_files())

    def arrays(self, name: str) -> OpenedArrays:
        return OpenedArrays(self._opener, self._prefix + name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        each = self._opener.tensors(self._prefix + name)
        return {tensor.name: _torch(self._opener, tensor) for tensor in each}


class OpenedArrays:
    """The tensors of one file of an opener, for numpy."""

    def __init__(self, opener: Opener, file: str) -> None:
        self._opener = opener
        self._tensors = {tensor.name: tensor for tensor in opener.tensors(file)}

    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str, shape: tuple[int, ...], dtypes: Sequence[type[np.generic]]) -> Array | None:
        tensor = self._tensors[name]
        dtype = NUMPY.get(tensor.dtype)
        if dtype is None or dtype not in dtypes or tensor.shape != shape:
            return None
        array = empty(shape, dtype)
        _fill(self._opener, tensor, array.reshape(math.prod(shape)).view(np.uint8))
        return array

    def let_go(self) -> None:
        """Nothing was resident but what was handed out."""


def _torch(opener: Opener, tensor: OpenedTensor) -> Tensor:
    import torch

    dtype = getattr(torch, TORCH.get(tensor.dtype, ""), None)
    if dtype is None:
        raise SourceError("a tensor has a number format that is not read")
    memory = torch.empty(tensor.data_bytes, dtype=torch.uint8)
    _fill(opener, tensor, memory.numpy())
    return memory.view(dtype).reshape(tensor.shape)


def _fill(opener: Opener, tensor: OpenedTensor, memory: Array) -> None:
    if tensor.data_bytes:  # an empty tensor's memory has no address
        _asked(opener, lambda: tensor.read_into(memory.data))


def _asked(opener: Opener, ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except opener.refuses as error:
        text = str(error)
    raise Unopened(text)  # outside the handler: what was being opened stays with the opener
