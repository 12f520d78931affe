"""Several ranks behind one engine: the tokens of one rank, whatever is asked of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from container.engine.engine import Engine
from container.engine.request import SamplingParams
from container.engine.step import Runner
from container.model import division, shape
from container.model.errors import ShardRefused
from container.model.folders import PlainFolder
from container.model.group import GroupBroken
from container.model.replay import ProbeFailed, ProbeReason
from container.model.shape import RunnerConfig
from container.model.shard_files import Recipe, save_shards
from container.model.source import DirectorySource
from container.model.start import build_runner
from container.model.steps import LayerSteps, Prepared
from tests.model.divided import divided_source
from tests.model.driving import CONFIG, greedy
from tests.model.ranks import RankedRunner, ThreadGroup, ranked, together
from tests.model.serving import PATIENT, ask, native_runner, real_text, serve
from tests.model.test_shard_files import fuse, quantize
from tests.model.tiny import TinySource, tiny_source

MIB = 2**20
PROMPTS = [[5, 9, 11, 4, 8], [7], list(range(3, 36))]
SAMPLED = [
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.8, top_p=0.9, seed=12),
    SamplingParams(temperature=1.3, top_k=20, repetition_penalty=1.1, seed=13),
    SamplingParams(temperature=0.7, min_p=0.05, frequency_penalty=0.2, seed=14, top_logprobs=3),
]


def whole(name: str, size: int) -> Runner:
    return native_runner(CONFIG, divided_source(name, size))


@cache
def parted(name: str, size: int) -> RankedRunner:
    return ranked(CONFIG, divided_source(name, size), size)[0]


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama", 2), ("llama_one_kv_head", 3), ("mixtral", 3), ("gpt_oss", 4), ("olmo2", 4), ("gemma2", 2)],
)
def test_ranks_answer_with_the_tokens_of_one(name: str, size: int) -> None:
    """Batched, chunked, with a window to cross, from the prefix cache and after it."""
    one = whole(name, size)
    assert greedy(parted(name, size), PROMPTS, 8, 8) == greedy(one, PROMPTS, 8, 8)
    assert parted(name, size).capacity() == one.capacity()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_seeded_sampling_draws_the_same_tokens_on_any_number_of_ranks(size: int) -> None:
    asked = [ask(n, PROMPTS[n % 3], 12, sampling) for n, sampling in enumerate(SAMPLED)]
    name = "mistral_odd_widths"
    assert serve(Engine(parted(name, size), PATIENT), asked) == serve(
        Engine(whole(name, size), PATIENT), asked
    )


def test_prompt_logprobs_cross_ranks() -> None:
    from container.engine.step import ROW_PROMPT_LOGPROBS, ROW_SAMPLES
    from tests.model.driving import Driver

    sampling = SamplingParams(temperature=0.0, prompt_logprobs=2)
    found = []
    for runner in (parted("llama", 2), whole("llama", 2)):
        driver = Driver(runner)
        sequence = driver.start(0, PROMPTS[0], sampling)
        driver.row(sequence, 5, ROW_SAMPLES | ROW_PROMPT_LOGPROBS)
        found.append(driver.step().rows[0].prompt_logprobs)
        runner.reset()
    for mine, theirs in zip(*found, strict=True):
        assert mine.token == theirs.token
        assert mine.logprob is not None and theirs.logprob is not None
        assert math.isclose(mine.logprob, theirs.logprob, abs_tol=1e-5)


def test_every_rank_tells_the_same_facts_about_the_whole_model() -> None:
    _, facts = ranked(CONFIG, divided_source("llama_tied", 3), 3)
    _, alone = build_runner(CONFIG, divided_source("llama_tied", 3), lambda phase: None)
    assert {fact.parameters for fact in facts} == {alone.parameters}
    assert {fact.runner for fact in facts} == {"native"}


def test_ranks_with_other_settings_do_not_start() -> None:
    source = divided_source("llama", 2)

    def start(group: ThreadGroup) -> None:
        build_runner(replace(CONFIG, step_tokens=64 + group.rank), source, lambda phase: None, group)

    with pytest.raises(GroupBroken):
        together(2, start)


def test_ranks_whose_steps_chose_other_kernels_do_not_start() -> None:
    def start(group: ThreadGroup) -> None:
        steps = LayerSteps(kernels=lambda: f"kernel {group.rank}")
        build_runner(CONFIG, divided_source("llama", 2), lambda phase: None, group, steps)

    with pytest.raises(GroupBroken):
        together(2, start)


def test_a_model_that_needs_compat_cannot_be_divided_and_says_why() -> None:
    with pytest.raises(ShardRefused, match="no_hook"):
        ranked(CONFIG, tiny_source("bloom"), 2)


def test_heads_that_do_not_divide_stop_the_start() -> None:
    with pytest.raises(ShardRefused, match="4 attention heads cannot be divided among 3 ranks"):
        ranked(CONFIG, tiny_source("llama"), 3)


def test_a_probe_that_rank_0_fails_fails_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from container.model import probe

    monkeypatch.setattr(probe, "agree", lambda *_, **__: False)
    seen: list[ProbeReason] = []

    def start(group: ThreadGroup) -> None:
        try:
            division.probe_division(divided_config_of("llama"), group)
        except ProbeFailed as failure:
            seen.append(failure.reason)

    together(2, start)
    assert seen == [ProbeReason.PROBE_DIFF] * 2


def divided_config_of(name: str) -> object:
    from container.model.load import read_config

    return read_config(divided_source(name, 2))


def test_the_smallest_budget_of_all_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunnerConfig(kv_mib=64)
    assert together(2, lambda group: division.budget_bytes(config, group)) == [32 * MIB] * 2
    monkeypatch.setattr(shape, "memory_limit_bytes", lambda: 1000 * MIB)
    monkeypatch.setattr(shape, "resident_bytes", lambda: 100 * MIB)
    assert together(3, lambda group: division.budget_bytes(RunnerConfig(), group)) == [200 * MIB] * 3
    held = iter((100, 700))
    monkeypatch.setattr(shape, "resident_bytes", lambda: next(held) * MIB)
    assert together(2, lambda group: division.budget_bytes(RunnerConfig(), group)) == [50 * MIB] * 2


def test_fused_and_quantized_ranks_serve_from_load_and_from_prepared_parts(tmp_path: Path) -> None:
    source = divided_source("llama", 2)
    recipe = Recipe("eighths/rows", ("gate_up",))
    save_shards(source, tmp_path, 2, torch.float32, recipe, fuse, quantize, lambda phase: None)
    steps = LayerSteps(fuse=fuse, quantize=quantize)
    bare = TinySource({"config.json": source.file("config.json") or b""}, {})  # no weights but the parts
    at_load, _ = ranked(CONFIG, source, 2, steps)
    prepared, _ = ranked(CONFIG, bare, 2, replace(steps, prepared=Prepared(PlainFolder(tmp_path), recipe)))
    assert greedy(prepared, PROMPTS, 8, 8) == greedy(at_load, PROMPTS, 8, 8)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_are_only_fused_are_judged_by_the_probe(size: int) -> None:
    source = divided_source("llama", 2)
    fused = ranked(CONFIG, source, size, LayerSteps(fuse=fuse))[0]
    assert greedy(fused, PROMPTS, 8, 8) == greedy(whole("llama", 2), PROMPTS, 8, 8)

    def spoil(layer: torch.nn.Module) -> None:
        layer.mlp.gate_proj.weight.data.neg_()

    if size > 1:
        with pytest.raises(ShardRefused, match="probe_diff"):
            ranked(CONFIG, source, size, LayerSteps(fuse=spoil))
    else:
        (facts,) = ranked(CONFIG, source, size, LayerSteps(fuse=spoil))[1]
        assert (facts.runner, str(facts.reason)) == ("compat", "probe_diff")


@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_three_ranks_answer_20_prompts_of_real_text_as_one_does(demo_checkpoint: Path) -> None:
    text = real_text(demo_checkpoint)
    asked = [ask(n, text[n * 997 : n * 997 + 3 + 3 * n], 4) for n in range(20)]
    config = RunnerConfig(sequence_tokens=256, running_limit=20, kv_mib=96, dtype="float32", threads=1)
    source = DirectorySource(demo_checkpoint)
    answers = serve(Engine(native_runner(config, source), PATIENT), asked)
    assert serve(Engine(ranked(config, source, 3)[0], PATIENT), asked) == answers


@pytest.mark.real_model
def test_nine_heads_are_refused_to_two_ranks_before_weights_are_read(demo_checkpoint: Path) -> None:
    config = RunnerConfig(sequence_tokens=256, kv_mib=64, dtype="float32", threads=1)
    with pytest.raises(ShardRefused, match="9 attention heads cannot be divided among 2 ranks"):
        ranked(config, DirectorySource(demo_checkpoint), 2)
