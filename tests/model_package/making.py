"""Packages made for tests: plain models without torch, the two parties' keys, seeded ids.

Owns: what a small model directory looks like. Must not know: what is done to a package afterwards.
Invariant: everything follows from its arguments; the keys are for tests and open nothing else.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from model_package import sealer, signing_keys
from model_package.layout import SMALL_CHUNK_LOG2
from model_package.manifest import Base, Manifest, Model
from model_package.opener import Contents, Trust, open_package
from model_package.recipients import Owner
from model_package.signature import Root, Roots

CREATED_S = 1_790_000_000
NOW_S = CREATED_S + 86_400
CHUNK = 1 << SMALL_CHUNK_LOG2

Plain = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data


def key(name: str) -> bytearray:
    """Return the 32 bytes of the test key called `name`."""
    return bytearray(hashlib.sha256(b"a key for tests: " + name.encode()).digest())


def root(name: str, not_after_s: int | None = None) -> Root:
    return Root(signing_keys.public_of(key(name)), not_after_s)


ROOTS = Roots(vendor=(root("vendor"),), customer=(root("customer"),))


def trust(
    owner: Owner = Owner.VENDOR, min_epoch: int = 0, base: Base | None = None, roots: Roots = ROOTS
) -> Trust:
    return Trust(owner, roots, NOW_S, min_epoch, base)


def seeded(seed: int) -> Callable[[int], bytes]:
    """Return ids that follow from `seed`, for tests that need the same package twice."""
    return random.Random(seed).randbytes


def safetensors(tensors: Sequence[Plain], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file with `tensors` in the order given."""
    table: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, dtype, shape, data in tensors:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + b"".join(data for *_, data in tensors)


def tensors(seed: int = 0) -> list[Plain]:
    """Return a small model: several chunks, one chunk exactly, a rest, a scalar, nothing."""
    data = random.Random(seed).randbytes
    return [
        ("model.embed.weight", "BF16", (3 * CHUNK // 2 + 50, 1), data(3 * CHUNK + 100)),
        ("model.layers.0.weight", "F32", (CHUNK // 4,), data(CHUNK)),
        ("model.layers.1.weight", "U8", (2, 150), data(300)),
        ("model.scale", "F16", (), data(2)),
        ("model.unused", "F32", (0, 7), b""),
    ]


def model(directory: Path, seed: int = 0) -> Path:
    """Write a small model of four files into `directory` and return it."""
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(safetensors(tensors(seed), {"format": "pt"}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (directory / "tokenizer.json").write_bytes(random.Random(seed + 1).randbytes(2 * CHUNK + 7))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def seal(
    source: Path,
    destination: Path,
    owner: Owner = Owner.VENDOR,
    data_key: str = "data",
    seed: int | None = None,
    epoch: int = 5,
    base: Base | None = None,
    recipients: Sequence[bytes] = (),
    threads: int = 1,
    log2_chunk: int = SMALL_CHUNK_LOG2,
) -> Manifest:
    """Seal the directory `source` as `owner` would, in small chunks."""
    told = sealer.Sealing(
        owner=owner,
        model=Model("tiny", "1.0"),
        created_s=CREATED_S,
        epoch=epoch,
        base=base,
        log2_chunk=log2_chunk,
        threads=threads,
    )
    if seed is not None:
        told = sealer.Sealing(
            owner, told.model, CREATED_S, epoch, base, log2_chunk, threads, draw=seeded(seed)
        )
    wrap = sealer.to_public_keys(recipients)
    return sealer.seal(sealer.files_of(source), destination, told, key(data_key), wrap, key(owner.value))


def opened(path: Path, data_key: str = "data", threads: int = 1) -> Contents:
    """Return the contents of a vendor's package."""
    return open_package(path, trust()).unlock(key(data_key), threads)


def read_all(contents: Contents) -> dict[str, bytes]:
    """Return file name -> content as it was before sealing."""
    found = {}
    for name in contents.names():
        content = contents.file(name)
        if content is None:
            header = contents.header(name)
            content = len(header).to_bytes(8, "little") + header
            for tensor in contents.tensors(name):
                data = bytearray(tensor.data_bytes)
                tensor.read_into(data)
                content += data
        found[name] = content
    return found


def plain(source: Path) -> dict[str, bytes]:
    """Return file name -> content of a plain directory."""
    return {name: path.read_bytes() for name, path in sealer.files_of(source).items()}
