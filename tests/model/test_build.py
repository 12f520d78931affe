"""Start-up: what is loaded, how it is judged, and what stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from container.engine.step import Runner
from container.model import attention, probe, shape
from container.model.build import assemble
from container.model.compat import Past, PlainModel
from container.model.facts import ModelFacts, ModelRefused
from container.model.load import LoadError, load, model_class, read_config
from container.model.positions import freeze_positions
from container.model.replay import ProbeFailed, ProbeReason, Rows, agree
from container.model.shape import RunnerConfig, SizingError
from container.model.source import DirectorySource
from tests.model.driving import CONFIG, greedy
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import TinySource, reference_model, tiny_config, tiny_source


def start(config: RunnerConfig, source: Any) -> tuple[Runner, ModelFacts]:
    return assemble(config, source, lambda phase: None, GreedySampler, score)


def test_facts_tell_what_was_loaded() -> None:
    phases: list[str] = []
    source = tiny_source("llama")
    _, facts = assemble(CONFIG, source, phases.append, GreedySampler, score)
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.parameters == sum(p.numel() for p in reference_model("llama").parameters())
    assert facts.dtype == "float32"
    assert set(facts.seconds) == {"probe_structure", "load", "probe_weights"}
    assert len(phases) >= 4


def test_the_room_switches_the_hub_off_before_its_client_is_imported() -> None:
    code = "import container.model.build, huggingface_hub.constants as c; assert c.HF_HUB_OFFLINE"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_capacity_follows_the_settings() -> None:
    runner, _ = start(CONFIG, tiny_source("llama"))
    capacity = runner.capacity()
    assert (capacity.slots, capacity.step_tokens, capacity.sequence_tokens) == (6, 64, 256)
    assert (capacity.block_tokens, capacity.vocabulary) == (4, 96)
    assert capacity.prefix_cache
    assert capacity.chunked_prefill
    assert not start(replace(CONFIG, prefix_cache=False), tiny_source("llama"))[0].capacity().prefix_cache


def test_compat_offers_neither_chunks_nor_a_prefix_cache() -> None:
    capacity = start(CONFIG, tiny_source("bloom"))[0].capacity()
    assert not capacity.chunked_prefill
    assert not capacity.prefix_cache
    assert capacity.step_tokens >= capacity.sequence_tokens


def test_a_model_that_needs_compat_is_refused_when_compat_is_off() -> None:
    with pytest.raises(ModelRefused, match="no_hook"):
        start(replace(CONFIG, compat=False), tiny_source("bloom"))


def test_prompt_logprobs_are_not_offered_where_logits_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "LOGITS_BYTES", 64 * 96 * 4)
    assert start(CONFIG, tiny_source("llama"))[0].capacity().prompt_logprobs
    monkeypatch.setattr(shape, "LOGITS_BYTES", 64 * 96 * 4 - 1)
    assert not start(CONFIG, tiny_source("llama"))[0].capacity().prompt_logprobs


def test_bfloat16_passes_the_probe_within_its_own_noise() -> None:
    runner, facts = start(replace(CONFIG, dtype="bfloat16"), tiny_source("llama"))
    assert (facts.runner, facts.dtype) == ("native", "bfloat16")
    assert len(greedy(runner, [[5, 6, 7]], 4, 8)[0]) == 4


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_directory_in_the_published_layout_gives_the_same_model(tmp_path: Path, kind: str) -> None:
    reference_model(kind).save_pretrained(tmp_path)
    runner, facts = start(CONFIG, DirectorySource(tmp_path))
    assert facts.runner == "native"
    prompts = [[5, 9, 11, 4, 8], [7]]
    assert greedy(runner, prompts, 6, 8) == greedy(start(CONFIG, tiny_source(kind))[0], prompts, 6, 8)


@pytest.mark.parametrize(("generation", "expected"), [(None, (2,)), ([7, 2, 7], (7, 2)), (9, (9,))])
def test_end_of_sequence_ids_come_from_the_generation_configuration_first(
    generation: object, expected: tuple[int, ...]
) -> None:
    source = tiny_source("llama")
    files = {"config.json": source.file("config.json") or b""}
    if generation is not None:
        files["generation_config.json"] = json.dumps({"eos_token_id": generation}).encode()
    _, facts = start(CONFIG, TinySource(files, dict(source.tensors())))
    assert facts.eos_token_ids == expected


def test_a_checkpoint_that_lacks_a_tensor_is_refused_without_its_name() -> None:
    source = tiny_source("llama")
    tensors = dict(source.tensors())
    name = next(name for name in tensors if "q_proj" in name)
    del tensors[name]
    with pytest.raises(LoadError, match="1 tensors") as caught:
        start(CONFIG, TinySource({"config.json": source.file("config.json") or b""}, tensors))
    assert "proj" not in str(caught.value)


def test_a_tensor_of_another_shape_is_refused_without_its_name() -> None:
    source = tiny_source("llama")
    tensors = dict(source.tensors())
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = torch.zeros(3, 3)
    with pytest.raises(LoadError) as caught:
        start(CONFIG, TinySource({"config.json": source.file("config.json") or b""}, tensors))
    assert "proj" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 3},
        {"model_type": "no_such_model"},
        {"model_type": "llama", "quantization_config": {"a": 1}},
    ],
)
def test_configurations_that_cannot_be_served_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(LoadError):
        read_config(TinySource({"config.json": json.dumps(config).encode()}, {}))


def test_a_model_that_is_no_causal_language_model_is_refused() -> None:
    config = read_config(TinySource({"config.json": b'{"model_type": "t5"}'}, {}))
    with pytest.raises(LoadError, match="causal"):
        model_class(config)


def test_a_length_beyond_the_window_stops_the_start() -> None:
    with pytest.raises(SizingError, match="window"):
        start(replace(CONFIG, sequence_tokens=513), tiny_source("llama"))


def longrope_source() -> TinySource:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 2.0 * i for i in range(8)],
        "original_max_position_embeddings": 64,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64, "sliding_window": None}
    return tiny_source("phi3", **changes)


@pytest.mark.parametrize("sequence_tokens", [64, 256])
def test_a_long_request_does_not_change_its_neighbours_positions(sequence_tokens: int) -> None:
    loaded = load(longrope_source(), torch.float32, lambda text: sequence_tokens, lambda phase: None)
    rotary = loaded.model.model.rotary_emb
    before = rotary.inv_freq.clone()
    long_factors = torch.tensor([1.0 + 2.0 * i for i in range(8)])
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(before, plain / long_factors if sequence_tokens > 64 else plain)
    for length in (5, 200):
        loaded.model(input_ids=torch.arange(length)[None] % 90, use_cache=False)
        assert torch.equal(rotary.inv_freq, before)


def test_dynamic_scaling_is_frozen_too() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    source = tiny_source("llama", rope_parameters=rope, max_position_embeddings=32)
    loaded = load(source, torch.float32, lambda text: 128, lambda phase: None)
    before = loaded.model.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(before, reference_model("llama").model.rotary_emb.inv_freq)
    loaded.model(input_ids=torch.arange(90)[None], use_cache=False)
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, before)


def test_models_with_plain_positions_are_left_alone() -> None:
    before = reference_model("llama").model.rotary_emb.inv_freq.clone()
    freeze_positions(reference_model("llama"), 100)
    assert torch.equal(reference_model("llama").model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("fault", ["window", "order", "mask", "twice", "raises"])
def test_the_probe_notices_a_hook_that_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.packed_attention
    reasons = {
        "window": ProbeReason.PROBE_DIFF,
        "order": ProbeReason.PROBE_DIFF,
        "mask": ProbeReason.MASK_SEEN,
        "twice": ProbeReason.HOOK_COUNT,
        "raises": ProbeReason.BUILD_ERROR,
    }

    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        if fault == "window":
            rest["sliding_window"] = None
        elif fault == "order":
            value = value.flip(2)
        elif fault == "mask":
            mask = torch.zeros(1)
        elif fault == "twice":
            right(module, query, key, value, mask, **rest)
        else:
            raise RuntimeError("a fault")
        return right(module, query, key, value, mask, **rest)

    monkeypatch.setattr(attention, "packed_attention", wrong)
    try:
        with pytest.raises(ProbeFailed) as caught:
            probe.probe_structure(tiny_config("mistral"))
    finally:
        monkeypatch.undo()
        attention.register()
    assert caught.value.reason == reasons[fault]


def test_the_weights_probe_judges_where_the_structure_probe_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe_structure", lambda config: False)
    assert start(CONFIG, tiny_source("llama"))[1].runner == "native"
    _, facts = start(CONFIG, tiny_source("falcon_h1"))
    assert (facts.runner, facts.reason) == ("compat", ProbeReason.PROBE_DIFF)
    _, facts = start(CONFIG, tiny_source("lfm2"))
    assert (facts.runner, facts.reason) == ("compat", ProbeReason.HOOK_COUNT)


def rows(*values: list[float]) -> Rows:
    return np.array(values, np.float32)


def test_in_bf16_the_order_of_two_logits_one_rounding_apart_is_noise() -> None:
    reference, swapped = rows([32.0, 31.75, 0.0]), rows([31.75, 32.0, 0.0])
    assert agree(swapped, reference, bfloat16=True)
    assert not agree(swapped, reference)
    assert not agree(rows([31.4, 31.6, 0.0]), rows([32.0, 31.0, 0.0]), bfloat16=True)


def test_logits_with_nan_never_agree() -> None:
    good = np.random.default_rng(1).standard_normal((3, 9), np.float32)
    assert agree(good, good)
    assert not agree(np.full_like(good, np.nan), good)
    assert not agree(np.full_like(good, np.inf), good)
    assert not agree(good + 1.0, good)


def test_a_clear_winner_must_stay_the_winner() -> None:
    reference = rows([1000.0, 1.0, 0.0], [0.0, 0.2, 0.0])
    other = rows([1000.0, 1.0, 0.0], [0.21, 0.2, 0.0])
    assert not agree(other, reference)


def test_compat_recomputes_where_a_cache_does_not_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PlainModel(reference_model("bloom"))
    plain.check(96)
    assert plain.cached
    honest = plain.advance

    def forgetful(past: Past, tokens: Any, wanted: int) -> torch.Tensor:
        past.name = None
        return honest(past, tokens, wanted)

    monkeypatch.setattr(plain, "advance", forgetful)
    plain.check(96)
    assert not plain.cached
    monkeypatch.undo()
    past = Past()
    plain.advance(past, [5, 6, 7], 1)
    row = plain.advance(past, [8], 1)
    expected = reference_model("bloom")(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits[
        0, -1:
    ]
    torch.testing.assert_close(row, expected)
