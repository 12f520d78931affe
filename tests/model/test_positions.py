"""Every kind of rotary scaling gives transformers' own logits, and no request changes another's positions."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from container.engine.step import ROW_SAMPLES, Runner
from container.model.build import assemble
from container.model.load import LoadError, load, read_config
from container.model.positions import freeze_positions, reach_tokens
from container.model.shape import RunnerConfig, SizingError, reach, wanted_tokens
from tests.model.driving import BLOCK, Driver
from tests.model.stand_in import GreedySampler, score
from tests.model.tiny import BASE, TinySource, reference_model

ORIGINAL = 64  # tokens the stretched models were made for
SHORT_FACTORS = [1.0 + 0.1 * i for i in range(8)]
LONG_FACTORS = [1.0 + 2.0 * i for i in range(8)]
THETA = {"rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        **THETA,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        **THETA,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT_FACTORS,
        "long_factor": LONG_FACTORS,
        "original_max_position_embeddings": ORIGINAL,
        **THETA,
    },
}
WINDOWS = {"dynamic": ORIGINAL, "yarn": ORIGINAL}  # the others say their stretched length: 256
LONGEST = 256
KINDS = {"longrope": "phi3"}  # llama for the others
# (scaling, longest sequence to serve): where the choice depends on it, both sides.
CLASSES = [
    ("linear", LONGEST),
    ("dynamic", ORIGINAL),
    ("dynamic", LONGEST),
    ("yarn", LONGEST),
    ("llama3", LONGEST),
    ("longrope", ORIGINAL),
    ("longrope", LONGEST),
]
TOLERANCE = 1e-4  # relative; fp32 sums in another order give up to about 5e-6


def config_values(scaling: str, spelling: str = "rope_parameters") -> dict[str, Any]:
    kind = KINDS.get(scaling, "llama")
    values: dict[str, Any] = {**BASE, "model_type": kind, spelling: dict(ROPES[scaling])}
    values["max_position_embeddings"] = WINDOWS.get(scaling, LONGEST)
    if scaling == "longrope":
        values.update(original_max_position_embeddings=ORIGINAL, sliding_window=None)
    return values


def scaled_source(values: dict[str, Any]) -> TinySource:
    tensors = {k: v.clone() for k, v in reference_model(values["model_type"]).state_dict().items()}
    return TinySource({"config.json": json.dumps(values).encode()}, tensors)


def own_logits(scaling: str, tokens: list[int]) -> Tensor:
    """Return what transformers computes for a lone sequence, with positions chosen as it goes."""
    values = config_values(scaling)
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(reference_model(values["model_type"]).state_dict())
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@cache
def built(scaling: str, longest: int) -> tuple[Runner, GreedySampler]:
    samplers: list[GreedySampler] = []

    def make(vocabulary: int) -> GreedySampler:
        samplers.append(GreedySampler(vocabulary))
        return samplers[-1]

    config = RunnerConfig(
        sequence_tokens=longest,
        running_limit=4,
        step_tokens=512,
        kv_mib=64,
        block_tokens=BLOCK,
        dtype="float32",
        threads=1,
    )
    runner, facts = assemble(config, scaled_source(config_values(scaling)), lambda _: None, make, score)
    assert facts.runner == "native"
    return runner, samplers[0]


def tokens_of(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (count,), generator=generator).tolist()


def last_logits(scaling: str, longest: int, prompts: list[list[int]]) -> list[Tensor]:
    """Return the logits after each prompt, all of them computed in one step."""
    runner, sampler = built(scaling, longest)
    runner.reset()
    driver = Driver(runner)
    for slot, prompt in enumerate(prompts):
        driver.row(driver.start(slot, prompt), len(prompt), ROW_SAMPLES)
    driver.step()
    rows = [sampler.logits[slot].clone() for slot in range(len(prompts))]
    runner.reset()
    return rows


@pytest.mark.parametrize(("scaling", "longest"), CLASSES)
def test_a_sequence_of_the_longest_length_gets_the_logits_of_transformers(scaling: str, longest: int) -> None:
    prompt = tokens_of(longest, 1)
    (row,) = last_logits(scaling, longest, [prompt])
    expected = own_logits(scaling, prompt)[-1]
    assert (row - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize(
    ("scaling", "longest"), [c for c in CLASSES if c[0] != "dynamic" or c[1] == ORIGINAL]
)
def test_a_sequence_of_the_same_class_gets_the_logits_of_transformers(scaling: str, longest: int) -> None:
    prompt = tokens_of(longest - 30 if longest == LONGEST else 20, 2)
    (row,) = last_logits(scaling, longest, [prompt])
    expected = own_logits(scaling, prompt)[-1]
    assert (row - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize(("scaling", "longest"), CLASSES)
def test_a_short_request_is_bit_equal_beside_a_long_one(scaling: str, longest: int) -> None:
    runner, sampler = built(scaling, longest)
    short, long = tokens_of(7, 3), tokens_of(longest, 4)
    rows = []
    for begun in (0, longest - 8):  # the same shapes both times; only the neighbour's positions differ
        runner.reset()
        driver = Driver(runner)
        neighbour = driver.start(1, long)
        if begun:
            driver.row(neighbour, begun)
            driver.step()
        driver.row(driver.start(0, short), 7)
        driver.row(neighbour, 8)
        driver.step()
        rows.append(sampler.logits[0].clone())
    runner.reset()
    assert torch.equal(*rows)


def test_the_two_classes_of_a_scaling_by_length_differ() -> None:
    prompt = tokens_of(20, 6)
    for scaling in ("dynamic", "longrope"):
        (narrow,) = last_logits(scaling, ORIGINAL, [prompt])
        (wide,) = last_logits(scaling, LONGEST, [prompt])
        assert (narrow - wide).norm() > 10 * TOLERANCE * wide.norm()


def test_freezing_again_chooses_anew() -> None:
    for scaling in ("dynamic", "longrope"):
        source = scaled_source(config_values(scaling))
        model = load(source, torch.float32, lambda _: LONGEST, lambda _: None).model
        wide = model.model.rotary_emb.inv_freq.clone()
        for tokens in (ORIGINAL, 100, LONGEST):
            freeze_positions(model, tokens)
            fresh = load(source, torch.float32, lambda _, n=tokens: n, lambda _: None).model  # type: ignore[misc]
            assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
        assert torch.equal(model.model.rotary_emb.inv_freq, wide)


def test_positions_follow_the_length_that_memory_allows() -> None:
    values = config_values("longrope")
    values["max_position_embeddings"] = 1 << 16
    config = RunnerConfig(running_limit=1, kv_mib=1, dtype="float32", threads=1, prefix_cache=False)
    runner, _ = assemble(config, scaled_source(values), lambda _: None, GreedySampler, score)
    served = runner.capacity().sequence_tokens
    assert ORIGINAL < served < 1 << 16
    values["rope_parameters"]["original_max_position_embeddings"] = 1 << 14
    values["original_max_position_embeddings"] = 1 << 14
    runner, _ = assemble(config, scaled_source(values), lambda _: None, GreedySampler, score)
    model = runner._packed._model  # type: ignore[attr-defined]
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / torch.tensor(SHORT_FACTORS))


@pytest.mark.parametrize("scaling", ROPES)
def test_the_older_spelling_gives_the_same_frequencies(scaling: str) -> None:
    old = config_values(scaling, "rope_scaling")
    rope = old["rope_scaling"]
    old["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    models = [
        load(scaled_source(values), torch.float32, lambda _: LONGEST, lambda _: None).model
        for values in (config_values(scaling), old)
    ]
    first, second = (model.model.rotary_emb for model in models)
    assert torch.equal(first.inv_freq, second.inv_freq)
    assert first.attention_scaling == second.attention_scaling


def gemma(rope: dict[str, Any]) -> TinySource:
    config = reference_model("gemma3_text").config.to_dict()
    local = {"rope_type": "default", **THETA}
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    config["max_position_embeddings"] = ORIGINAL
    tensors = {k: v.clone() for k, v in reference_model("gemma3_text").state_dict().items()}
    return TinySource({"config.json": json.dumps(config).encode()}, tensors)


def test_kinds_by_layer_are_frozen_each_for_itself() -> None:
    source = gemma(ROPES["dynamic"])
    frozen = load(source, torch.float32, lambda _: 128, lambda _: None).model.model.rotary_emb
    assert frozen.rope_type == {"full_attention": "default", "sliding_attention": "default"}
    assert not torch.equal(frozen.full_attention_inv_freq, frozen.full_attention_original_inv_freq)
    assert torch.equal(frozen.sliding_attention_inv_freq, frozen.sliding_attention_original_inv_freq)
    before = frozen.full_attention_inv_freq.clone()
    for length in (10, 200):
        frozen(torch.zeros(1), torch.arange(length)[None], "full_attention")
        assert torch.equal(frozen.full_attention_inv_freq, before)


@pytest.mark.parametrize("nested", [False, True])
def test_an_unknown_kind_is_refused_by_name(nested: bool) -> None:
    rope = {"rope_type": "spiral", "factor": 2.0, **THETA}
    source = (
        gemma(rope) if nested else scaled_source({**BASE, "model_type": "llama", "rope_parameters": rope})
    )
    with pytest.raises(LoadError, match="spiral"):
        read_config(source)


def test_a_scaling_that_stretches_is_served_as_far_as_it_reaches() -> None:
    reaches = {}
    for scaling in ROPES:
        text = read_config(scaled_source(config_values(scaling)))
        reaches[scaling] = reach_tokens(text, text.max_position_embeddings)
        longest = reaches[scaling][1]
        assert wanted_tokens(*reach(text), RunnerConfig()) == reaches[scaling][0]
        assert wanted_tokens(*reach(text), RunnerConfig(sequence_tokens=longest)) == longest
        with pytest.raises(SizingError, match=str(longest)):
            wanted_tokens(*reach(text), RunnerConfig(sequence_tokens=longest + 1))
    assert reaches == {
        "linear": (256, 256),
        "dynamic": (64, 256),
        "yarn": (256, 256),
        "llama3": (256, 256),
        "longrope": (256, 256),
    }


def test_layers_that_are_not_stretched_hold_the_others_back() -> None:
    text = read_config(gemma(ROPES["yarn"])).get_text_config()
    assert reach_tokens(text, ORIGINAL) == (ORIGINAL, ORIGINAL)
