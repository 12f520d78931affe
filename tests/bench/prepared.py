"""Our model as a vendor ships it: made ready beforehand, as other engines' models are converted beforehand.

Owns: the copy that is made ready, the memory that keys and values get. Must not know: how an engine uses it.
Invariant: the directory that was given is never written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.bench.environments import ROOT, Place, SetupFailed, key_of

SCHEME: Final = "int8-block"
KV_TOKENS: Final = 10_240  # W3, the largest workload, has 8,672 with all 32 requests at their ends
FLOAT32_BYTES: Final = 4
# What makes what is stored.
MAKERS: Final = ("model/ready_files.py", "model/ready_make.py", "kernels/blocks.py", "kernels/int8.py")


def ready(model: Path, quantize: str, say: Callable[[str], None], root: Path | None = None) -> Path:
    """Return a directory of the model with its ready decoder, made the first time; else `model` itself."""
    if quantize != SCHEME:
        return model
    place = Place("strongroom", root)
    makers = b"".join((ROOT / "container" / name).read_bytes() for name in MAKERS)
    copy = place.folder / f"{key_of(model)}-{hashlib.sha256(makers).hexdigest()[:8]}"

    def make() -> None:
        say("making the model ready (once)")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for path in model.iterdir():
            if path.is_file():
                _link(path, copy / path.name)
        words = ("--model", copy, "--tensor-parallel", "1", "--quantize", quantize)
        place.run(
            sys.executable, "-m", "container.model.parts", *words, environment={"PYTHONPATH": str(ROOT)}
        )

    try:
        place.once(f"ready-{copy.name}", make)
    except SetupFailed as failed:
        say(f"the model is not made ready: {failed}")
        return model
    return copy


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # another file system
        shutil.copyfile(path, copy)


def kv_mib(model: Path) -> int:
    """Return the memory in which KV_TOKENS keys and values in float32 lie."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    elements = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * dim
    return -(-KV_TOKENS * elements * FLOAT32_BYTES // 2**20)
