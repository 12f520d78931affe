"""What was sealed comes out bit for bit, into the caller's memory, in whole or in part."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_package import toc
from model_package.layout import LARGE_CHUNK_LOG2, Kind
from model_package.opener import open_package
from model_package.outcome import PackageError
from tests.model_package import making
from tests.model_package.making import CHUNK

TORCH_DTYPES = {
    name: getattr(torch, kind)
    for name, kind in {
        "bool": "bool",
        "uint8": "uint8",
        "int8": "int8",
        "int16": "int16",
        "uint16": "uint16",
        "int32": "int32",
        "uint32": "uint32",
        "int64": "int64",
        "uint64": "uint64",
        "fp16": "float16",
        "bf16": "bfloat16",
        "fp32": "float32",
        "fp64": "float64",
        "complex64": "complex64",
        "fp8_e4m3": "float8_e4m3fn",
        "fp8_e5m2": "float8_e5m2",
        "fp8_e4m3fnuz": "float8_e4m3fnuz",
        "fp8_e5m2fnuz": "float8_e5m2fnuz",
        "fp8_e8m0": "float8_e8m0fnu",
        "fp4_packed": "float4_e2m1fn_x2",
    }.items()
}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return every bit pattern the type has, NaNs and negative zeros included."""
    count = max(1, torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.frombuffer(bytearray(random.Random(seed).randbytes(count)), dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw & 1
    return raw.view(dtype)[: torch.Size(shape).numel()].reshape(shape)


def read_into_torch(contents: making.Contents, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for stored in contents.tensors("model.safetensors"):
        memory = torch.empty(stored.data_bytes, dtype=torch.uint8)
        stored.read_into(memoryview(memory.numpy()))
        found[stored.name] = memory.view(like[stored.name].dtype).reshape(like[stored.name].shape)
    return found


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """With no dimension, with none of its elements, with an odd number, and over several chunks."""
    kind = TORCH_DTYPES[dtype]
    shapes: dict[str, tuple[int, ...]] = {
        "empty": (0, 3),
        "row": (7,),
        "matrix": (33, 2, 64),
        "large": (5001,),
    }
    if dtype != "fp4_packed":  # safetensors writes its last dimension doubled
        shapes["scalar"] = ()
    written = {name: random_tensor(kind, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    source = tmp_path / "plain"
    source.mkdir()
    save_file(written, source / "model.safetensors")
    making.seal(source, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        read = read_into_torch(contents, written)
        assert {name: bits(tensor) for name, tensor in read.items()} == {
            name: bits(tensor) for name, tensor in written.items()
        }
        assert making.read_all(contents) == making.plain(source)


def test_packed_int4_as_quantizers_store_it_comes_back(tmp_path: Path) -> None:
    """Two weights to a byte, with scales in fp16 and zero points in int32 beside them."""
    packed = random_tensor(torch.uint8, (64, 128), 1)
    written = {
        "q.weight_packed": packed,
        "q.weight_scale": random_tensor(torch.float16, (64, 2), 2),
        "q.weight_zero": random_tensor(torch.int32, (64, 2), 3),
    }
    source = tmp_path / "plain"
    source.mkdir()
    save_file(written, source / "model.safetensors")
    making.seal(source, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        read = read_into_torch(contents, written)
    assert all(bits(read[name]) == bits(written[name]) for name in written)


@pytest.mark.parametrize("dtype", toc.DTYPE_BITS)
def test_every_dtype_of_the_format_comes_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """Those included that this torch cannot hold."""
    count = 3 * CHUNK // toc.DTYPE_BITS[dtype] * 8 // 8 * 8
    data = random.Random(7).randbytes(count * toc.DTYPE_BITS[dtype] // 8)
    source = tmp_path / "plain"
    source.mkdir()
    content = making.safetensors([("a", dtype, (count,), data), ("b", dtype, (0,), b"")])
    (source / "model.safetensors").write_bytes(content)
    making.seal(source, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        assert making.read_all(contents) == {"model.safetensors": content}
        assert [tensor.dtype for tensor in contents.tensors("model.safetensors")] == [dtype, dtype]


@pytest.mark.parametrize("threads", [1, 2])
def test_large_chunks_and_threads_give_the_same_bytes(threads: int, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(11 * (1 << LARGE_CHUNK_LOG2) + 12_345)
    source = tmp_path / "plain"
    source.mkdir()
    (source / "model.safetensors").write_bytes(making.safetensors([("a", "U8", (len(data),), data)]))
    making.seal(source, tmp_path / "sealed", threads=threads, log2_chunk=LARGE_CHUNK_LOG2)
    with making.opened(tmp_path / "sealed", threads=threads) as contents:
        assert making.read_all(contents) == making.plain(source)


def test_a_file_without_tensors_and_an_empty_file_come_back(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    (source / "model.safetensors").write_bytes(making.safetensors([]))
    (source / "empty.txt").write_bytes(b"")
    making.seal(source, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        assert making.read_all(contents) == making.plain(source)


def test_files_in_folders_keep_their_names(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    parts = source / "parts" / "2-int8-block"
    parts.mkdir(parents=True)
    (parts / "model-rank-0-of-2.safetensors").write_bytes(making.safetensors(making.tensors(9)))
    (source / ".gitattributes").write_text("left out")
    made = making.seal(source, tmp_path / "sealed")
    assert "parts/2-int8-block/model-rank-0-of-2.safetensors" in {entry.name for entry in made.files}
    with making.opened(tmp_path / "sealed") as contents:
        assert making.read_all(contents) == making.plain(source)
        assert ".gitattributes" not in contents.names()
        assert set(contents.names(Kind.TENSORS)) == {
            "model.safetensors",
            "parts/2-int8-block/model-rank-0-of-2.safetensors",
        }


@pytest.mark.parametrize("threads", [1, 2])
def test_any_range_of_a_tensor_is_that_part_of_it(threads: int, tmp_path: Path) -> None:
    """Every cut around the edges of chunks, and random ones."""
    source = making.model(tmp_path / "plain")
    making.seal(source, tmp_path / "sealed")
    edges = sorted({max(0, edge + by) for edge in range(0, 3 * CHUNK + 100, CHUNK) for by in (-1, 0, 1)})
    rng = random.Random(5)
    with making.opened(tmp_path / "sealed", threads=threads) as contents:
        tensor = next(contents.tensors("model.safetensors"))
        whole = making.tensors()[0][3]
        cuts = [(start, end) for start in edges for end in [*edges, len(whole)] if start <= end]
        cuts += [tuple(sorted(rng.choices(range(len(whole) + 1), k=2))) for _ in range(100)]
        for start, end in cuts:
            memory = bytearray(end - start)
            tensor.read_range(start, memory)
            assert memory == whole[start:end]


def test_a_range_reads_only_the_chunks_that_hold_it(tmp_path: Path) -> None:
    """A rank reads its own part: every other chunk of the file may be gone."""
    source = making.model(tmp_path / "plain")
    made = making.seal(source, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        tensor = next(contents.tensors("model.safetensors"))
        (entry,) = [entry for entry in made.files if entry.name == "model.safetensors"]
        path = tmp_path / "sealed" / entry.stored_name
        raw = bytearray(path.read_bytes())
        begin = len(raw) - sum(len(data) for *_, data in making.tensors()) - 16 * 8  # of the first tensor
        kept = raw[begin + CHUNK + 16 : begin + 2 * (CHUNK + 16)]  # its second chunk
        raw[begin:] = bytes(len(raw) - begin)
        raw[begin + CHUNK + 16 : begin + 2 * (CHUNK + 16)] = kept
        with path.open("r+b") as file:
            file.write(raw)
        memory = bytearray(CHUNK)
        tensor.read_range(CHUNK, memory)
        assert memory == making.tensors()[0][3][CHUNK : 2 * CHUNK]
        with pytest.raises(PackageError, match="corrupted or tampered with"):
            tensor.read_range(0, memory)


def test_memory_of_another_length_and_ranges_outside_are_refused(tmp_path: Path) -> None:
    making.seal(making.model(tmp_path / "plain"), tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        tensor = next(contents.tensors("model.safetensors"))
        for length in (0, tensor.data_bytes - 1, tensor.data_bytes + 1):
            with pytest.raises(ValueError, match="not as long"):
                tensor.read_into(bytearray(length))
        for start, length in ((-1, 1), (tensor.data_bytes, 1), (1, tensor.data_bytes)):
            with pytest.raises(ValueError, match="leaves the tensor"):
                tensor.read_range(start, bytearray(length))


def test_a_closed_package_reads_nothing_more(tmp_path: Path) -> None:
    making.seal(making.model(tmp_path / "plain"), tmp_path / "sealed")
    package = open_package(tmp_path / "sealed", making.trust())
    with package, package.unlock(making.key("data")) as contents:
        tensor = next(contents.tensors("model.safetensors"))
    with pytest.raises(ValueError, match="closed"):
        tensor.read_into(bytearray(tensor.data_bytes))
    assert contents.names() == ()


def test_two_sealings_of_the_same_model_share_no_block_of_16_bytes(tmp_path: Path) -> None:
    """With the same key and with zeros for content, where any reuse of key and nonce would show."""
    source = tmp_path / "plain"
    source.mkdir()
    content = making.safetensors([("a", "U8", (20 * CHUNK,), bytes(20 * CHUNK))])
    (source / "model.safetensors").write_bytes(content)
    blocks: set[bytes] = set()
    count = 0
    for name in ("first", "second"):
        (entry,) = making.seal(source, tmp_path / name).files
        sealed = (tmp_path / name / entry.stored_name).read_bytes()[64:]
        found = [sealed[place : place + 16] for place in range(0, len(sealed) - 15, 16)]
        count += len(found)
        blocks.update(found)
    assert len(blocks) == count > 10_000


def test_the_seal_costs_less_than_a_hundredth_of_a_percent(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    data = bytes(64 << LARGE_CHUNK_LOG2)
    (source / "model.safetensors").write_bytes(making.safetensors([("a", "U8", (len(data),), data)]))
    (entry,) = making.seal(source, tmp_path / "sealed", log2_chunk=LARGE_CHUNK_LOG2).files
    plain_bytes = (source / "model.safetensors").stat().st_size
    assert 0 < entry.size - plain_bytes <= plain_bytes * 1e-4


def test_the_same_seed_gives_the_same_package_and_no_seed_another(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    made: list[Callable[[], dict[str, bytes]]] = []
    for number, seed in enumerate((1, 1, 2, None, None)):
        making.seal(source, tmp_path / str(number), seed=seed)
        made.append(lambda path=tmp_path / str(number): making.plain(path))
    first, again, other, fresh, fresher = (read() for read in made)
    assert first == again
    assert len({each["manifest.json"] for each in (first, other, fresh, fresher)}) == 4
