"""Layers with a window hold a ring of the latest tokens: the same answers out of a fraction of the memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from container.engine.engine import Engine
from container.engine.request import EngineRequest, RequestKey
from container.engine.step import Capacity, Runner
from container.model import attention
from container.model.kv_cache import KVCache, Place
from container.model.kv_limits import KVLimits, LayerShape
from container.model.probe import measure
from container.model.runner import NativeRunner
from container.model.shape import RunnerConfig
from container.model.start import build_runner
from tests.model.serving import CONNECTION, PATIENT, Answers, ask, serve
from tests.model.test_concurrent import Cramped
from tests.model.tiny import VOCABULARY, reference_model, tiny_source

BLOCK = 4
STEP = 9  # tokens; with BLOCK it asks for rings of 12, longer than the models' windows of 8
CONFIG = RunnerConfig(
    sequence_tokens=160,
    running_limit=4,
    step_tokens=STEP,
    kv_mib=16,
    block_tokens=BLOCK,
    dtype="float32",
    threads=1,
)
WINDOWED = ("mistral", "gemma2", "gemma3_text", "gpt_oss")
WIDE = LayerShape(2, 8, 8)
NARROW = LayerShape(2, 8, 8, window=20)
ODD = LayerShape(1, 12, 4, window=50)
LAYERS = [NARROW, WIDE, NARROW, ODD, WIDE]


def cache(step_tokens: int | None = 10) -> KVCache:
    return KVCache(LAYERS, torch.float32, KVLimits(4, 1000, BLOCK, 300, None, step_tokens))


def write(place: Place, first: int, last: int, value: float) -> None:
    """Write as attention does: position p at p modulo the length of the slab."""
    for tensor in (*place.shelf.keys, *place.shelf.values):
        at = torch.arange(first, last)
        tensor[place.row, :, at % tensor.shape[2]] = (at + value)[None, :, None]


def extend(kv: KVCache, slot: int, last: int, value: float) -> Place:
    """Grow the slot's sequence to `last` positions, no more than a step at a time, saving full blocks."""
    while kv.written(slot) < last:
        first = kv.written(slot)
        place = kv.place(slot, min(last, first + 10))
        write(place, first, place.tokens, value)
        for index in range(first // BLOCK, place.tokens // BLOCK):
            kv.save(slot, index, 1 + index)
    return kv.place(slot, last)


def assert_holds(place: Place, value: float) -> None:
    """Every layer holds the latest positions, as many as it is long, and zeros where nothing was written."""
    for tensor in (*place.shelf.keys, *place.shelf.values):
        length = tensor.shape[2]
        at = torch.arange(max(0, place.tokens - length), place.tokens)
        expected = torch.zeros(length)
        expected[at % length] = at + value
        assert torch.equal(tensor[place.row], expected[None, :, None].expand_as(tensor[place.row]))


def lengths(place: Place) -> list[int]:
    return [tensor.shape[2] for tensor in place.shelf.keys]


def test_a_ring_holds_the_window_or_a_step_and_a_block() -> None:
    limits = KVLimits(4, 1000, BLOCK, 300, None, 10)
    assert limits.held_tokens(None) == 1000
    assert limits.held_tokens(50) == 52  # whole blocks
    assert limits.held_tokens(6) == 16  # 10 + 3, in whole blocks
    assert limits.held_tokens(5000) == 1000
    assert replace(limits, step_tokens=None).held_tokens(50) == 1000


def test_only_layers_without_a_window_grow_with_the_sequence() -> None:
    kv = cache()
    assert lengths(extend(kv, 0, 100, 1.0)) == [20, 128, 20, 52, 128]
    assert lengths(extend(kv, 0, 700, 1.0)) == [20, 1000, 20, 52, 1000]


def test_growth_keeps_what_the_window_still_sees() -> None:
    kv = cache()
    for tokens in (1, 19, 20, 21, 51, 52, 53, 128, 129, 300, 997):
        assert_holds(extend(kv, 0, tokens, 3.0), 3.0)


@pytest.mark.parametrize("tokens", [4, 16, 20, 24, 48, 52, 56, 128, 132, 300])
def test_a_hit_restores_what_its_windows_see(tokens: int) -> None:
    kv = cache()
    extend(kv, 0, 320, 2.0)
    kv.restore(1, [1 + index for index in range(tokens // BLOCK)])
    place = kv.place(1, tokens)
    for tensor in (*place.shelf.keys, *place.shelf.values):
        length = tensor.shape[2]
        at = torch.arange(max(0, tokens - length), tokens)
        held = tensor[place.row, :, at % length]
        assert torch.equal(held, (at + 2.0)[None, :, None].expand_as(held))
    assert_holds(extend(kv, 1, tokens + 17, 2.0), 2.0)


def test_a_released_ring_is_wiped() -> None:
    kv = cache()
    place = extend(kv, 0, 333, 3.0)
    kv.release(0)
    assert all(not stack.any() for stack in place.shelf.stacks)


def test_a_block_cannot_be_saved_after_its_window_has_passed() -> None:
    kv = cache()
    extend(kv, 0, 60, 3.0)
    with pytest.raises(AssertionError, match="window has passed"):
        kv.save(0, 9, 10)
    kv.save(0, 10, 11)


def test_a_step_longer_than_promised_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="promised"):
        cache().place(0, 11)


def test_random_use_of_rings_never_mixes_sequences() -> None:
    rng = random.Random(4)
    kv = cache()
    ends: dict[int, int] = {}
    for step in range(60):
        slot = rng.randrange(4)
        if slot in ends and (rng.random() < 0.15 or ends[slot] > 400):
            kv.release(slot)
            del ends[slot]
        elif slot not in ends and kv.stored_blocks and rng.random() < 0.5:
            blocks = rng.randint(1, kv.stored_blocks)
            kv.restore(slot, list(range(1, blocks + 1)))
            ends[slot] = blocks * BLOCK
        else:
            ends[slot] = ends.get(slot, 0) + rng.randint(1, 60)
            extend(kv, slot, ends[slot], 7.0)
        for other, tokens in ends.items():
            place = kv.place(other, tokens)
            for tensor in (*place.shelf.keys, *place.shelf.values):
                at = torch.arange(max(0, tokens - tensor.shape[2]), tokens)
                held = tensor[place.row, :, at % tensor.shape[2]]
                assert torch.equal(held, (at + 7.0)[None, :, None].expand_as(held))
        if step % 10 == 0:
            assert_free_rows_are_zero(kv)


def assert_free_rows_are_zero(kv: KVCache) -> None:
    taken = {(id(place.shelf), place.row) for place in kv._places.values()}
    for shelf in (shelf for shelves in kv._shelves.values() for shelf in shelves):
        for row in range(shelf.rows):
            if (id(shelf), row) not in taken:
                assert all(not stack[:, row].any() for stack in shelf.stacks), "a free row is not zero"


@dataclass
class Watched:
    """A native runner whose slabs are looked at after every step."""

    runner: NativeRunner

    def capacity(self) -> Capacity:
        return self.runner.capacity()

    def run(self, plan: Any) -> Any:
        result = self.runner.run(plan)
        kv = self.runner._packed.kv
        assert_free_rows_are_zero(kv)
        for place in kv._places.values():
            for stack in place.shelf.stacks:
                assert not stack[:, place.row, :, place.tokens :].any(), "a row holds more than was written"
        return result

    def reset(self) -> None:
        self.runner.reset()

    def close(self) -> None:
        self.runner.close()


def windowed_runner(kind: str, config: RunnerConfig = CONFIG) -> Watched:
    runner, facts = build_runner(config, tiny_source(kind, max_position_embeddings=4096), lambda _: None)
    assert facts.runner == "native"
    assert isinstance(runner, NativeRunner)
    return Watched(runner)


def generated(kind: str, prompt: Sequence[int], count: int) -> list[int]:
    """Return the greedy continuation by transformers' own generate."""
    tokens = reference_model(kind).generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    answer: list[int] = tokens[0, len(prompt) :].tolist()
    return answer


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize("kind", WINDOWED)
def test_windowed_models_answer_as_the_reference_does_under_preemption_and_hits(kind: str) -> None:
    rng = random.Random(kind)
    runner = windowed_runner(kind)
    shared = random_tokens(rng, 40)
    prompts = [shared[: rng.choice((0, 8, 20, 40))] + random_tokens(rng, n) for n in (1, 3, 9, 12, 30, 50)]
    requests = [ask(number, prompt, 40) for number, prompt in enumerate(prompts)]
    engine = Engine(Cramped(runner, 132), PATIENT)
    answers = serve(engine, requests)
    assert engine.stats().preemptions > 0, "the pool was not small enough"
    for number, prompt in enumerate(prompts):
        assert answers[number].tokens == generated(kind, prompt, 40)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 20])
def test_a_prompt_of_whole_blocks_sent_again_hits_and_answers_alike(kind: str, blocks: int) -> None:
    rng = random.Random(blocks)
    runner = windowed_runner(kind)
    prompt = random_tokens(rng, blocks * BLOCK)
    engine = Engine(runner, PATIENT)
    answers: Answers = {}
    for number in range(2):
        answers.update(serve(engine, [ask(number, prompt, 12)]))
    longer = [*prompt, *answers[0].tokens, 5, 6]
    answers.update(serve(engine, [ask(2, longer, 12)]))
    assert answers[0].tokens == answers[1].tokens == generated(kind, prompt, 12)
    assert answers[2].tokens == generated(kind, longer, 12)
    second, third = (blocks - 1) * BLOCK, (len(prompt) + 11) // BLOCK * BLOCK
    assert engine.stats().prefix_hit_tokens == second + third


def test_a_prompt_that_leaves_a_published_chain_early_hits_up_to_there() -> None:
    rng = random.Random(9)
    engine = Engine(windowed_runner("gemma3_text"), PATIENT)
    chain = random_tokens(rng, 100)
    serve(engine, [ask(0, chain, 4)])
    for number, blocks in enumerate((1, 3, 6, 18), start=1):
        before = engine.stats().prefix_hit_tokens
        prompt = chain[: blocks * BLOCK] + random_tokens(rng, 7)
        assert serve(engine, [ask(number, prompt, 8)])[number].tokens == generated("gemma3_text", prompt, 8)
        assert engine.stats().prefix_hit_tokens - before == blocks * BLOCK


def test_a_cancelled_sequence_leaves_no_trace_in_a_ring() -> None:
    rng = random.Random(10)
    runner = windowed_runner("mistral")
    engine = Engine(runner, PATIENT)

    def leave(step: int, answers: Answers) -> None:
        if step == 8:
            engine.cancel(RequestKey(CONNECTION, 0))

    requests: list[EngineRequest] = [ask(n, random_tokens(rng, 50), 30) for n in range(3)]
    serve(engine, requests, leave)
    serve(engine, [ask(9, [5], 1)])  # the next plan tells the runner
    kv = runner.runner._packed.kv
    assert len(kv._places) <= 1


def test_scores_that_are_written_out_are_cut_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    prompt = random_tokens(rng, 60)
    for kind in ("gemma2", "gpt_oss", "deepseek_v3"):
        runner = windowed_runner(kind)
        whole = serve(Engine(runner, PATIENT), [ask(0, prompt, 8)])[0].tokens
        runner.reset()
        monkeypatch.setattr(attention, "SCORES", 500)
        assert serve(Engine(runner, PATIENT), [ask(0, prompt, 8)])[0].tokens == whole
        monkeypatch.undo()
        assert whole == generated(kind, prompt, 8)


def held_bytes(layers: Sequence[LayerShape], tokens: int, step: int) -> int:
    """Return what a cache reserves for one sequence, one row a shelf."""
    kv = KVCache(layers, torch.bfloat16, KVLimits(1, tokens, 16, 1, None, step))
    kv._place(0, tokens)
    return kv.slab_bytes


def test_a_model_like_gemma_3_holds_a_fraction_of_the_memory() -> None:
    def layers(window: int | None) -> list[LayerShape]:
        full = LayerShape(1, 256, 256)
        return [full if (layer + 1) % 6 == 0 else replace(full, window=window) for layer in range(26)]

    before = held_bytes(layers(None), 8192, 256)
    assert before == 26 * 8192 * 1024
    after = held_bytes(layers(512), 8192, 256)
    assert after == (4 * 8192 + 22 * 512) * 1024
    assert after < 0.21 * before


def test_the_probe_sees_the_window_of_every_layer() -> None:
    for kind, expected in (("mistral", [8, 8]), ("gemma3_text", [8, None]), ("llama", [None, None])):
        runner, _ = build_runner(CONFIG, tiny_source(kind), lambda _: None)
        assert isinstance(runner, NativeRunner)
        measured = measure(runner._packed._model, 2)
        assert [layer.window for layer in measured.layers] == expected


def test_a_windowed_model_may_run_more_sequences_in_the_same_memory() -> None:
    def tokens(kind: str) -> int:
        config = RunnerConfig(
            sequence_tokens=2048, running_limit=16, step_tokens=64, kv_mib=9, dtype="float32", threads=1
        )
        runner: Runner = windowed_runner(kind, config)
        capacity = runner.capacity()
        return capacity.blocks * capacity.block_tokens

    assert tokens("mistral") > 2.5 * tokens("llama")


def test_a_row_that_does_not_go_on_where_its_slot_ended_is_an_error_of_ours() -> None:
    from container.model.rows import PackedRow

    packed = windowed_runner("mistral").runner._packed
    packed.logits([PackedRow(0, 0, [5, 6, 7], (2,))])
    for start in (0, 2, 4):
        with pytest.raises(AssertionError, match="go on"):
            packed.logits([PackedRow(0, start, [5], (0,))])
    row: Tensor = packed.logits([PackedRow(0, 3, [5], (0,))])
    assert row.shape == (1, VOCABULARY)
