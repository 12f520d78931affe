"""The start of the engine process: no garbage collection while libraries and weights come in."""

from __future__ import annotations

import gc
import os

import pytest

from container.ranks.assembly import Loaded, Report, StartFailed
from container.ranks.config import EngineConfig
from container.ranks.heartbeat import HeartbeatWriter, StartFault, make_page
from container.ranks.main import _start
from container.ranks.place import Place


def test_garbage_is_not_collected_while_loading_and_is_again_afterwards() -> None:
    seen: list[bool] = []

    def refuse(config: EngineConfig, report: Report, place: Place) -> Loaded:
        seen.append(gc.isenabled())
        raise StartFailed(StartFault.MODEL_REFUSED, "not this one")

    page_fd = make_page()
    with HeartbeatWriter(page_fd) as page, pytest.raises(StartFailed):
        _start(EngineConfig(model_dir="."), page, refuse)
    os.close(page_fd)
    assert seen == [False]
    assert gc.isenabled()
