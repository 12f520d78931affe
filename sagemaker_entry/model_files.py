"""The small files of a model artifact that the front reads: tokenizer, template, generation defaults.

Owns: which files, how large, what of generation_config.json counts. Must not know: weights, HTTP.
Invariant: only listed names are opened, as regular files, and read once.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from container.engine.request import SamplingParams

NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
MAX_FILE_BYTES: Final = 64 * 1024 * 1024  # the text room has tighter limits of its own


def read(model_dir: str) -> dict[str, bytes]:
    """Return name -> content of the files that exist; raises OSError, and ValueError for an oversized one."""
    return {name: _read(path) for name in NAMES if (path := Path(model_dir, name)).exists()}


def default_sampling(files: dict[str, bytes]) -> SamplingParams:
    """Return the sampling parameters generation_config.json asks for, where it asks for sampling at all."""
    try:
        document: Any = json.loads(files.get("generation_config.json", b"{}"))
    except ValueError:
        return SamplingParams()
    if not isinstance(document, dict) or document.get("do_sample") is not True:
        return SamplingParams()
    wanted: dict[str, Any] = {}
    for name, low, high in (
        ("temperature", 1e-8, 100.0),
        ("top_p", 1e-8, 1.0),
        ("min_p", 0.0, 1.0),
        ("typical_p", 1e-8, 1.0),
        ("repetition_penalty", 0.01, 100.0),
    ):
        value = document.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            wanted[name] = float(value)
    top_k = document.get("top_k")
    if isinstance(top_k, int) and not isinstance(top_k, bool) and 0 <= top_k < 2**31:
        wanted["top_k"] = top_k
    return SamplingParams(**wanted)


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"`{path.name}` is not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"`{path.name}` is larger than {MAX_FILE_BYTES} bytes")
    return content
