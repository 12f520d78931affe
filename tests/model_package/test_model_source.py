"""A sealed package serves what the model room asks of its source: the tensors of the plain directory.

The adapter below is all that stands between the two rooms; neither knows the other.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from container.model.source import DirectorySource, ModelSource, SourceError, StoredTensor
from model_package.layout import Kind
from model_package.opener import Contents, SealedTensor
from model_package.outcome import PackageError
from tests.model_package import making

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class SealedSource:
    """Files and tensors of an unlocked package."""

    contents: Contents

    def file(self, name: str) -> bytes | None:
        return self.contents.file(name)

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        for file in self.contents.names(Kind.TENSORS):
            for tensor in self.contents.tensors(file):
                yield tensor.name, StoredTensor(tensor.shape, partial(read, tensor))


def read(tensor: SealedTensor) -> Tensor:
    memory = torch.empty(tensor.data_bytes, dtype=torch.uint8)
    try:
        tensor.read_into(memoryview(memory.numpy()))
    except PackageError:
        raise SourceError("corrupted or tampered with") from None
    return memory.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint in two files with an index."""
    directory = tmp_path / "plain"
    directory.mkdir()
    torch.manual_seed(1)
    shards = {
        "model-00001-of-00002.safetensors": {
            "embed.weight": torch.randn(300, 17).bfloat16(),
            "norm.weight": torch.randn(()),
        },
        "model-00002-of-00002.safetensors": {
            "head.weight": torch.randn(41, 64).to(torch.float8_e4m3fn),
            "packed": torch.randint(0, 256, (9, 5), dtype=torch.uint8),
            "nothing": torch.empty(0, 4),
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_bytes(random.Random(1).randbytes(9000))
    return directory


def taken(source: ModelSource) -> dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]:
    found = {}
    for name, stored in source.stored():
        tensor = stored.read()
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        found[name] = (stored.shape, tensor.dtype, raw)
    return found


def test_the_model_room_gets_the_same_tensors_and_files(plain: Path, tmp_path: Path) -> None:
    making.seal(plain, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        sealed, directory = SealedSource(contents), DirectorySource(plain)
        assert taken(sealed) == taken(directory)
        for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
            assert sealed.file(name) == directory.file(name) is not None
        assert sealed.file("generation_config.json") is None


def test_a_rank_reads_its_rows_alone(plain: Path, tmp_path: Path) -> None:
    """Rows of a matrix lie together: a part of a rank is a range of bytes."""
    making.seal(plain, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        stored = {t.name: t for file in contents.names(Kind.TENSORS) for t in contents.tensors(file)}
        embed = stored["embed.weight"]
        rows, row_bytes = embed.shape[0], embed.data_bytes // embed.shape[0]
        whole = read(embed)
        for rank in range(2):
            memory = torch.empty(rows // 2 * row_bytes, dtype=torch.uint8)
            embed.read_range(rank * rows // 2 * row_bytes, memoryview(memory.numpy()))
            part = memory.view(torch.bfloat16).reshape(rows // 2, -1)
            assert torch.equal(part, whole[rank * rows // 2 : (rank + 1) * rows // 2])


def test_a_plain_file_in_the_packages_directory_is_never_read(plain: Path, tmp_path: Path) -> None:
    """What is sealed is served; what lies beside it under the same name, or another, is not."""
    making.seal(plain, tmp_path / "sealed")
    (tmp_path / "sealed" / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "sealed" / "generation_config.json").write_text("{}")
    with making.opened(tmp_path / "sealed") as contents:
        assert contents.file("config.json") == (plain / "config.json").read_bytes()
        assert contents.file("generation_config.json") is None
