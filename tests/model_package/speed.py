"""How fast a sealed package loads beside a plain copy of the same bytes: python -m tests.model_package.speed.

Owns: the measurement. Must not know: what the figures should be.
Invariant: the ways alternate within each round, each time into fresh memory; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from model_package import sealer, toc
from model_package.layout import LARGE_CHUNK_LOG2
from model_package.manifest import Model
from model_package.opener import open_package
from tests.model_package import making

CHUNK = 1 << LARGE_CHUNK_LOG2
NAME = "model.safetensors"


def prepare(folder: Path, mib: int, tensors: int = 8) -> None:
    """Write a model of `mib` MiB in `tensors` tensors, plain and sealed, into `folder`."""
    (folder / "plain").mkdir()
    size = mib * (1 << 20) // tensors
    block = random.Random(1).randbytes(size)
    listed = [(f"layer.{number}.weight", "U8", (size,), block) for number in range(tensors)]
    (folder / "plain" / NAME).write_bytes(making.safetensors(listed))
    told = sealer.Sealing(making.Owner.VENDOR, Model("speed", "1"), making.CREATED_S, threads=2)
    files = sealer.files_of(folder / "plain")
    sealer.seal(files, folder / "sealed", told, making.key("data"), lambda _c, _k: [], making.key("vendor"))


def fresh(length: int) -> memoryview:
    """Return memory that nobody has touched, as a tensor that was just made."""
    return memoryview(mmap.mmap(-1, length))


def load_plain(folder: Path) -> None:
    held = []
    fd = os.open(folder / "plain" / NAME, os.O_RDONLY)
    try:
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        for entry in toc.parse(os.pread(fd, length, 8), None):
            memory, done = fresh(entry.data_bytes), 0
            while done < len(memory):
                done += os.preadv(fd, [memory[done:]], 8 + length + entry.begin + done)
            held.append(memory)
    finally:
        os.close(fd)


def load_sealed(folder: Path, threads: int) -> None:
    held = []
    package = open_package(folder / "sealed", making.trust())
    with package, package.unlock(making.key("data"), threads) as contents:
        for tensor in contents.tensors(NAME):
            memory = fresh(tensor.data_bytes)
            tensor.read_into(memory)
            held.append(memory)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Return seconds by the clock and of CPU."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def decrypt_rates(chunks: int = 256) -> tuple[float, float]:
    """Return GB/s of GCM alone on one core, by the clock and by CPU time, into memory that was touched."""
    cipher, nonce, bound = AESGCM(bytes(making.key("rate"))), bytes(12), bytes(113)
    sealed, out = cipher.encrypt(nonce, random.Random(2).randbytes(CHUNK), bound), bytearray(CHUNK)

    def run() -> None:
        for _ in range(chunks):
            cipher.decrypt_into(nonce, sealed, bound, out)

    run()
    wall_s, cpu_s = timed(run)
    return chunks * CHUNK / 1e9 / wall_s, chunks * CHUNK / 1e9 / cpu_s


def measure(mib: int, rounds: int) -> dict[str, object]:
    """Return medians over rounds; ratios are sealed over plain, within a round."""
    with tempfile.TemporaryDirectory(prefix="strongroom-speed-") as name:
        folder = Path(name)
        prepare(folder, mib)
        ways: dict[str, Callable[[], None]] = {
            "plain": lambda: load_plain(folder),
            "sealed_1_thread": lambda: load_sealed(folder, 1),
            "sealed_2_threads": lambda: load_sealed(folder, 2),
        }
        for call in ways.values():
            call()
        seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        rates = []
        for number in range(rounds):
            order = list(ways)[number % 3 :] + list(ways)[: number % 3]
            for way in order:
                seen[way].append(timed(ways[way]))
            rates.append(decrypt_rates())
    gigabytes = mib * (1 << 20) / 1e9
    wall = {way: [each[0] for each in times] for way, times in seen.items()}
    ratios = {
        way: [mine / plain for mine, plain in zip(wall[way], wall["plain"], strict=True)]
        for way in ways
        if way != "plain"
    }
    return {
        "mib": mib,
        "rounds": rounds,
        "gb_per_s": {way: round(gigabytes / statistics.median(times), 2) for way, times in wall.items()},
        "cpu_s_per_gb": {
            way: round(statistics.median(each[1] for each in times) / gigabytes, 2)
            for way, times in seen.items()
        },
        "ratio": {way: round(statistics.median(found), 2) for way, found in ratios.items()},
        "ratio_least_and_most": {
            way: [round(min(found), 2), round(max(found), 2)] for way, found in ratios.items()
        },
        "gcm_gb_per_s_by_clock": round(statistics.median(rate[0] for rate in rates), 2),
        "gcm_gb_per_cpu_s": round(statistics.median(rate[1] for rate in rates), 2),
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="speed", allow_abbrev=False)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.mib, chosen.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
