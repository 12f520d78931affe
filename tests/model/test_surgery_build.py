"""Surgery at start-up: chosen by a setting, guarded by the probe, told in the facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from container.engine.step import Runner
from container.model import surgery, surgery_linear
from container.model.build import assemble
from container.model.facts import ModelFacts
from container.model.replay import ProbeReason
from container.model.shape import SizingError
from tests.model.driving import CONFIG, greedy
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import tiny_source

PROMPTS = [[5, 9, 11, 4, 8], [7], list(range(20, 45))]


def start(kind: str, setting: str, **changes: Any) -> tuple[Runner, ModelFacts]:
    config = replace(CONFIG, surgery=setting, **changes)
    return assemble(config, tiny_source(kind), lambda phase: None, GreedySampler, score)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "gpt_oss", "opt"])
def test_greedy_tokens_are_the_same_with_and_without(kind: str) -> None:
    without, facts = start(kind, "off")
    assert (facts.runner, facts.fused) == ("native", {})
    operated, facts = start(kind, "on")
    assert facts.runner == "native"
    assert facts.fused["qkv"] == 2
    assert greedy(operated, PROMPTS, 8, 8) == greedy(without, PROMPTS, 8, 8)


def test_left_to_itself_a_cpu_replaces_only_what_pays_there_which_is_nothing() -> None:
    _, facts = start("llama", "auto")
    assert (facts.runner, facts.fused) == ("native", {})


def test_an_unknown_setting_stops_the_start() -> None:
    with pytest.raises(SizingError, match="`surgery` is `maybe`"):
        start("llama", "maybe")


def test_a_model_that_fails_after_surgery_is_served_natively_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of single modules is blinded here: the probe of the whole model must see the fault."""
    honest = surgery_linear.GatedMLP.forward

    def wrong(self: surgery_linear.GatedMLP, hidden: Tensor) -> Tensor:
        return honest(self, hidden) * 1.5

    monkeypatch.setattr(surgery_linear.GatedMLP, "forward", wrong)
    monkeypatch.setattr(surgery_linear, "agree", lambda candidate, original: True)
    operated, facts = start("llama", "on")
    assert (facts.runner, facts.reason, facts.fused) == ("native", None, {})
    assert greedy(operated, PROMPTS, 8, 8) == greedy(start("llama", "off")[0], PROMPTS, 8, 8)


def test_a_model_that_fails_either_way_goes_to_compat_in_its_own_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("container.model.probe.probe_structure", lambda config: False)
    found: list[nn.Module] = []
    honest: Callable[..., Any] = surgery.fuse

    def watched(module: nn.Module, *rest: Any) -> surgery.Fused:
        found.append(module)
        fused: surgery.Fused = honest(module, *rest)
        assert fused.counts, "there was nothing to undo"
        return fused

    monkeypatch.setattr(surgery, "fuse", watched)
    compat, facts = start("falcon_h1", "on")
    monkeypatch.undo()
    assert (facts.runner, facts.reason, facts.fused) == ("compat", ProbeReason.PROBE_DIFF, {})
    rooms = {type(module).__module__.partition(".")[0] for module in found[0].modules()}
    assert "container" not in rooms
    assert greedy(compat, PROMPTS, 4, 8) == greedy(start("falcon_h1", "off")[0], PROMPTS, 4, 8)


def test_a_failure_that_is_not_surgery_is_passed_on() -> None:
    class Refused(Exception):
        pass

    def judge() -> None:
        raise Refused

    with pytest.raises(Refused):
        surgery.guarded(nn.Sequential(), surgery.ALL_PARTS, lambda: None, judge, Refused)
