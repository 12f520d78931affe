"""The demo model operated on: the same logits, every layer fused, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from container.model.load import load
from container.model.probe import measure
from container.model.source import DirectorySource
from container.model.surgery import Part, fuse
from tests.model.surgery_table import packed_logits

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

LAYERS = 30
BUDGET_S = 5.0  # CPU time; 0.6 s measured on two cores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_demo_model_is_fused_throughout_and_keeps_its_logits(
    demo_checkpoint: Path, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    loaded = load(DirectorySource(demo_checkpoint), dtype, lambda text: 512, lambda phase: None)
    loaded.use_hook()
    before = packed_logits(loaded.model)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    begun_s = time.process_time()
    fused = fuse(loaded.model, trial=lambda: measure(loaded.model, LAYERS))
    taken_s = time.process_time() - begun_s
    record_property("cpu_seconds", round(taken_s, 2))
    assert fused.counts == {Part.QKV: LAYERS, Part.GATE_UP: LAYERS, Part.NORM: 2 * LAYERS + 1}
    error = (packed_logits(loaded.model) - before).norm() / before.norm()
    assert error <= (1e-5 if dtype == torch.float32 else 0.03)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loaded.model.parameters()}
    assert sum(held.values()) == weights
    assert taken_s <= BUDGET_S
