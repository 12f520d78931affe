"""Positions frozen by length among ranks: chosen once, so memory that allows less stops the start."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from container.engine.step import Runner
from container.model.build import assemble
from container.model.shape import RunnerConfig, SizingError
from tests.model.ranks import together
from tests.model.stand_in import GreedySampler, score
from tests.model.test_positions import config_values, scaled_source

WINDOW = 1 << 16  # tokens; more than `kv_mib` holds
CONFIG = RunnerConfig(running_limit=1, kv_mib=2, dtype="float32", threads=1, prefix_cache=False)


def started(scaling: str, config: RunnerConfig) -> Runner:
    """Return rank 0's runner of a model whose window is WINDOW, divided among two ranks."""
    values: dict[str, Any] = config_values(scaling)
    values["max_position_embeddings"] = WINDOW
    source = scaled_source(values)
    runners = together(2, lambda group: assemble(config, source, lambda _: None, GreedySampler, score, group))
    return runners[0][0]


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_ranks_whose_memory_is_less_than_their_positions_were_chosen_for_do_not_start(scaling: str) -> None:
    with pytest.raises(SizingError, match=f"positions were chosen for {WINDOW}") as refused:
        started(scaling, CONFIG)
    (fitting,) = re.findall(r"at most (\d+)", str(refused.value))
    runner = started(scaling, replace(CONFIG, sequence_tokens=int(fitting)))
    assert runner.capacity().sequence_tokens == int(fitting) < WINDOW


def test_ranks_whose_positions_are_the_same_at_every_length_serve_what_memory_allows() -> None:
    assert 1 << 10 < started("llama3", CONFIG).capacity().sequence_tokens < WINDOW
