"""Prompts up to the model's own limit: the same tokens however they are cut, and no more memory for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from container.engine.engine import Engine
from container.engine.request import ErrorCode, FinishReason, Refused
from container.engine.step import Runner
from container.model.attention import Span, Step, attending, packed_attention
from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits, LayerShape
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource
from tests.model.serving import PATIENT, ask, native_runner, real_text, serve
from tests.model.test_attention import Layer, by_hand
from tests.model.tiny import VOCABULARY, reference_model, tiny_source

LIMIT = 32_768  # tokens the tiny model says it was made for
NEW = 8


def long_runner(sequence_tokens: int, step_tokens: int, kind: str = "llama") -> Runner:
    config = RunnerConfig(
        sequence_tokens=sequence_tokens,
        running_limit=2,
        step_tokens=step_tokens,
        kv_mib=128,
        dtype="float32",
        threads=1,
    )
    return native_runner(config, tiny_source(kind, max_position_embeddings=LIMIT))


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def assert_reference(kind: str, prompt: list[int], answer: list[int]) -> None:
    """Every token of `answer` is the best by one whole forward of transformers' model over all before it."""
    assert len(answer) == NEW
    tokens = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.inference_mode():
        logits = reference_model(kind)(input_ids=tokens, use_cache=False, logits_to_keep=NEW).logits[0]
    assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_long_prompt_gets_the_reference_answer_however_it_is_cut(kind: str) -> None:
    prompt = random_tokens(1, 1200)
    for step_tokens in (16, 256, 4096):
        runner = long_runner(2048, step_tokens, kind)
        assert_reference(kind, prompt, serve(Engine(runner, PATIENT), [ask(0, prompt, NEW)])[0].tokens)
        runner.close()


@pytest.mark.parametrize("step_tokens", [48, 4096])
def test_long_prompts_of_whole_blocks_hit_when_sent_again(step_tokens: int) -> None:
    engine = Engine(long_runner(2048, step_tokens), PATIENT)
    tokens = random_tokens(2, 768)
    hits = 0
    for number, blocks in enumerate((48, 48, 47, 17, 2, 1)):
        prompt = tokens[: blocks * 16]
        answer = serve(engine, [ask(number, prompt, NEW)])[number].tokens
        assert_reference("llama", prompt, answer)
        hits += 0 if number == 0 else (blocks - 1) * 16
        assert engine.stats().prefix_hit_tokens == hits


def test_a_prompt_at_the_limit_is_served_and_one_token_more_is_refused() -> None:
    engine = Engine(long_runner(2048, 512), PATIENT)
    prompt = random_tokens(3, 2048 - NEW)
    for tokens in (NEW + 1, NEW + 2048):
        with pytest.raises(Refused) as caught:
            engine.submit(ask(0, prompt, tokens))
        assert caught.value.code is ErrorCode.CONTEXT_LENGTH
    answer = serve(engine, [ask(1, prompt, NEW)])[1]
    assert (len(answer.tokens), answer.finish) == (NEW, FinishReason.LENGTH)
    assert_reference("llama", prompt, answer.tokens)


def test_without_a_set_length_the_model_is_served_to_its_own_limit() -> None:
    config = RunnerConfig(running_limit=1, kv_mib=64, dtype="float32", threads=1)
    runner = native_runner(config, tiny_source("llama", max_position_embeddings=LIMIT))
    engine = Engine(runner, PATIENT)
    assert runner.capacity().sequence_tokens == LIMIT
    engine.submit(ask(0, random_tokens(4, LIMIT - 1), 1))
    with pytest.raises(Refused):
        engine.submit(ask(1, random_tokens(4, LIMIT), 1))


@pytest.mark.parametrize("window", [None, 512])
def test_the_mask_of_a_long_prompt_costs_a_line_and_not_a_square(window: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    start, count = 64 * 93, 64
    tokens = start + count
    limits = KVLimits(1, tokens, 16, 1, step_tokens=count)
    kv = KVCache([LayerShape(1, 8, 8, window)], torch.float32, limits)
    q, k, v = (torch.randn(heads, tokens, 8, generator=generator) for heads in (2, 1, 1))
    out = torch.empty(0)
    for first in range(0, tokens, count):
        part = slice(first, min(first + count, tokens))
        place = kv.place(0, part.stop)
        span = Span(place.shelf, place.row, 0, part.stop - first, first)
        with attending(Step([], [span])):
            out = packed_attention(
                Layer(), q[None, :, part], k[None, :, part], v[None, :, part], None, sliding_window=window
            )[0][0]
        held = sum(mask.untyped_storage().nbytes() for mask in span.masks.values())
        assert held <= (part.stop + count) * 4
    low = 0 if window is None else tokens - count - window
    expected = by_hand(
        torch.cat((torch.zeros(2, tokens - count - low, 8), q[:, -count:]), dim=1),
        k[:, low:],
        v[:, low:],
        window,
        None,
        None,
        8**-0.5,
    )[-count:]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_the_demo_model_answers_at_the_end_of_its_window(demo_checkpoint: Path) -> None:
    config = RunnerConfig(running_limit=1, step_tokens=256, kv_mib=1600, dtype="float32", threads=1)
    runner = native_runner(config, DirectorySource(demo_checkpoint))
    limit = runner.capacity().sequence_tokens
    assert limit == 8192
    prompt = real_text(demo_checkpoint)[: limit - NEW]
    engine = Engine(runner, PATIENT)
    first = serve(engine, [ask(0, prompt, NEW)])[0].tokens
    again = serve(engine, [ask(1, prompt, NEW)])[1].tokens
    assert first == again
    assert engine.stats().prefix_hit_tokens == (len(prompt) - 1) // 16 * 16
    with pytest.raises(Refused):
        engine.submit(ask(2, prompt, NEW + 1))
    runner.close()
