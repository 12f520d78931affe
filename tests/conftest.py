"""Fixtures that more than one room needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Triton runs its kernels on the CPU, in numpy. Before any of them is imported: its decorator decides.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a safetensors directory; converted in the first run, then reused.

    `STRONGROOM_TEST_CACHE` moves the cache out of the checkout. Tests that use it are marked `real_model`.
    """
    from scripts.demo_model import ensure_checkpoint  # imports torch: only for those who ask

    cache_dir = Path(os.environ.get("STRONGROOM_TEST_CACHE") or REPOSITORY / ".cache" / "models")
    return ensure_checkpoint(cache_dir, lambda stage, done: None)
