"""Loads one rank's part of a model in a process of its own and prints what that took, in bytes.

python -m tests.model.load_memory DIRECTORY RANK SIZE DTYPE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from container.model.load import load, model_class, quiet, read_config
from container.model.source import DirectorySource


def peak_bytes() -> int:
    """Return the most memory this process ever held, mapped files included."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no peak")


def main() -> None:
    directory, rank, size, dtype = sys.argv[1:]
    quiet()
    source = DirectorySource(directory)
    model_class(read_config(source))  # imports what loading imports, so that only loading is measured
    before = peak_bytes()
    kind = getattr(torch, dtype)
    loaded = load(source, kind, lambda _: 64, lambda _: None, rank=int(rank), size=int(size))
    after = peak_bytes()
    head = loaded.model.get_output_embeddings().weight
    embedding = loaded.model.get_input_embeddings().weight
    everything = (*loaded.model.parameters(), *loaded.model.buffers())
    own = {t.data_ptr(): t.nbytes for t in everything if t is embedding or t is not head}
    storage = head.untyped_storage().data_ptr()
    tied = storage == embedding.untyped_storage().data_ptr()
    shard = sum(own.values()) + (0 if tied else head.nbytes)
    stored = [stored.shape for _, stored in source.stored()]
    report = {
        "grown": after - before,
        "shard": shard,
        "largest": max(torch.Size(shape).numel() for shape in stored) * kind.itemsize,
        "whole": loaded.parameters * kind.itemsize,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
