"""How much each part of surgery gains: fused and unfused copies of one model, step by step in turn.

`python -m tests.model.surgery_speed CHECKPOINT [bfloat16]` prints the median ratio of fused to unfused time,
CPU and wall, of neighbouring steps: below 1, surgery pays. The row `nothing` compares two untouched copies
and so shows the noise. One thread, since CPU time is then the work done, whatever else the machine runs.
"""

from __future__ import annotations

import sys
import time
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch

from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits
from container.model.load import load
from container.model.packed import PackedModel
from container.model.probe import measure
from container.model.rows import PackedRow
from container.model.source import DirectorySource
from container.model.surgery import ALL_PARTS, Part, fuse

CONTEXT = 64  # tokens before each decoding step
PREFILL = 256
LOADS = {
    "decode 1": (1, 30),
    "decode 8": (8, 14),
    "decode 32": (32, 8),
    "prefill 256": (0, 6),
}  # rows, pairs
VARIANTS: dict[str, frozenset[Part]] = {
    "nothing": frozenset(),
    **{part.value: frozenset({part}) for part in Part},
    "all": ALL_PARTS,
}


def packed(model: Any) -> PackedModel:
    layers = measure(model, model.config.num_hidden_layers).layers
    return PackedModel(model, KVCache(layers, next(model.parameters()).dtype, KVLimits(33, 320, 16, 1)))


def step(model: PackedModel, batch: int, position: int) -> tuple[float, float]:
    """Run one step: `batch` sequences by a token each, or a prefill; return CPU and wall seconds."""
    if batch:
        rows = [PackedRow(slot, position, [position + slot], (0,)) for slot in range(batch)]
    else:
        model.kv.release(32)
        rows = [PackedRow(32, 0, list(range(3, 3 + PREFILL)), (PREFILL - 1,))]
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    model.logits(rows)
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


def ratios(fused: PackedModel, plain: PackedModel, batch: int, pairs: int) -> tuple[float, float, float]:
    """Return median CPU ratio, median wall ratio, and the unfused step's median CPU milliseconds."""
    cpu, wall, alone = [], [], []
    for model in (fused, plain):
        for slot in range(batch):
            model.kv.release(slot)
            model.logits([PackedRow(slot, 0, list(range(3, 3 + CONTEXT)), ())])
        step(model, batch, CONTEXT)
    for pair in range(pairs):
        order = (fused, plain) if pair % 2 else (plain, fused)
        times = {id(model): step(model, batch, CONTEXT + 1 + pair) for model in order}
        (fused_cpu, fused_wall), (plain_cpu, plain_wall) = times[id(fused)], times[id(plain)]
        cpu.append(fused_cpu / plain_cpu)
        wall.append(fused_wall / plain_wall)
        alone.append(plain_cpu * 1000)
    return median(cpu), median(wall), median(alone)


def main(checkpoint: Path, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    loaded = load(DirectorySource(checkpoint), dtype, lambda text: 512, lambda phase: None)
    loaded.use_hook()
    plain = packed(deepcopy(loaded.model))  # a copy like the fused: loaded weights may lie in a file's pages
    print("load         part      cpu    wall   unfused ms (CPU)")
    for name, chosen in VARIANTS.items():
        model = deepcopy(loaded.model)
        begun_s = time.process_time()
        fuse(model, chosen)
        seconds = time.process_time() - begun_s
        fused = packed(model)
        for load_name, (batch, pairs) in LOADS.items():
            cpu, wall, alone = ratios(fused, plain, batch, pairs)
            print(f"{load_name:12} {name:8} {cpu:6.3f} {wall:6.3f}   {alone:8.1f}", flush=True)
        print(f"fusing and verifying `{name}` took {seconds:.2f} s of CPU time")
        fused.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.bfloat16 if "bfloat16" in sys.argv[2:] else torch.float32)
