"""The start of the engine process: no garbage collection while libraries and weights come in."""

from __future__ import annotations

import gc
import os
from dataclasses import replace

import pytest

from container.model.facts import ModelFacts
from container.model.replay import ProbeReason
from container.ranks.assembly import Loaded, Report, StartFailed, assemble, summary_of
from container.ranks.config import EngineConfig
from container.ranks.heartbeat import HeartbeatWriter, StartFault, make_page
from container.ranks.main import _start
from container.ranks.place import Place
from tests.engine.bench import capacity
from tests.engine.fake_runner import FakeRunner


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


def test_the_operator_is_told_the_quantization_and_why_and_no_name() -> None:
    facts = ModelFacts(
        runner="compat",
        reason=ProbeReason.NO_HOOK,
        architecture="SecretForCausalLM",
        parameters=7,
        dtype="float32",
        eos_token_ids=(2,),
        fused={"qkv": 30},
        quantize="int8-block",
        quantize_reason="does not fit",
        quantized="210 linear layers",
    )
    assert summary_of(facts) == (
        "compat (no_hook), float32; quantization int8-block: does not fit (210 linear layers); "
        "fused: 30 qkv; operators: torch"
    )
    plain = replace(facts, runner="native", reason=None, quantize="none", quantize_reason="it fits", fused={})
    assert (
        summary_of(plain) == "native, float32; quantization none: it fits; fused: nothing; operators: torch"
    )


def test_the_line_about_the_model_comes_once_it_is_loaded() -> None:
    lines: list[str] = []

    def load(config: EngineConfig, report: Report, place: Place) -> Loaded:
        assert not lines
        return Loaded(FakeRunner(capacity()), "native", None, summary="as chosen")

    assemble(EngineConfig(model_dir="."), lambda phase: None, load, tell=lines.append)
    assert lines == ["engine loaded: as chosen"]
