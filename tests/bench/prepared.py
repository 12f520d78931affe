"""Our model as a vendor ships it: made ready beforehand, as other engines' models are converted beforehand.

Owns: the copy that is made ready, its sealed form, the memory that keys and values get.
Must not know: how an engine uses it, how a package is sealed.
Invariant: the directory that was given is never written to; what was sealed is gone when its context ends.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from scripts import demo_package
from tests.bench.environments import Place, SetupFailed, key_of
from tests.bench.rounds import Contestant

KV_TOKENS: Final = 10_240  # W3, the largest workload, has 8,672 with all 32 requests at their ends
FLOAT32_BYTES: Final = 4


def ready(model: Path, quantize: str, say: Callable[[str], None], root: Path | None = None) -> Path:
    """Return a directory of the model with its ready decoder, made the first time; else `model` itself."""
    if quantize != demo_package.SCHEME:
        return model
    place = Place("strongroom", root)
    copy = place.folder / f"{key_of(model)}-{demo_package.makers_digest()}"

    def make() -> None:
        say("making the model ready (once)")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        try:
            demo_package.make_ready(model, copy)
        except subprocess.CalledProcessError as failed:
            raise SetupFailed(str(failed.stderr)[-500:]) from failed

    try:
        place.once(f"ready-{copy.name}", make)
    except SetupFailed as failed:
        say(f"the model is not made ready: {failed}")
        return model
    return copy


@contextmanager
def sealed(plain: Contestant, say: Callable[[str], None]) -> Iterator[Contestant]:
    """Yield the endpoint `plain` with its model sealed under new keys, which go with the package."""
    say(f"sealing the model of {plain.name}")
    with demo_package.sealed(plain.model, plain.model.name, lambda stage, share: None) as package:
        keys = {
            name.removeprefix("STRONGROOM_").lower(): value for name, value in package.environment.items()
        }
        yield replace(plain, name=f"{plain.name} sealed", model=package.path, options=plain.options | keys)


def kv_mib(model: Path) -> int:
    """Return the memory in which KV_TOKENS keys and values in float32 lie."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    elements = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * dim
    return -(-KV_TOKENS * elements * FLOAT32_BYTES // 2**20)
