"""Grammars of a small vocabulary: what is allowed, when an output is complete, how one slot fails alone."""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from container.engine.grammar import GrammarState
from container.engine.request import Grammar, GrammarKind, SamplingParams
from container.engine.step import SlotAssignment
from container.model import grammar as grammars_module
from container.model.grammar import GrammarCache, over
from container.model.masks import Masks, Verdict, masks_over
from tests.model.tiny import TinySource, tiny_source

AB, EOS, OTHER_EOS, TOOL = 256, 257, 258, 259  # ids below are bytes; the last three are special
WIDTH = 264  # a row of logits is wider than the vocabulary
LETTERS = Grammar(GrammarKind.REGEX, "[a-z]{1,4}")
WORD = Grammar(GrammarKind.REGEX, "yes|no")
ENDLESS = Grammar(GrammarKind.REGEX, "a+")
BROKEN = Grammar(GrammarKind.REGEX, "(secret[")
AMBIGUOUS = Grammar(GrammarKind.LARK, 'start: e\ne: e e | "a" | "b" e | e "c"')
# Each token doubles what a parser has to keep in mind, until it may not.
RUNAWAY = Grammar(GrammarKind.REGEX, "(a{1,1000}){1,1000}")


def byte_tokenizer() -> bytes:
    """Return a tokenizer.json whose ids 0-255 are the bytes in order."""
    alphabet = {ch: number for number, ch in enumerate(_byte_letters())}
    vocabulary = {**alphabet, "ab": AB}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [
        {
            "id": id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id, text in ((EOS, "<end>"), (OTHER_EOS, "<stop>"), (TOOL, "<tool>"))
    ]
    return json.dumps(spec).encode()


def _byte_letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


@pytest.fixture(scope="module")
def cache() -> Iterator[GrammarCache]:
    made = GrammarCache(byte_tokenizer(), [EOS, OTHER_EOS])
    assert made.available
    yield made
    made.check()
    made.close()


@pytest.fixture
def masks(cache: GrammarCache) -> Iterator[Masks]:
    made = Masks(cache, WIDTH)
    yield made
    made.close()


def assigned(
    grammar: Grammar | None,
    slot: int = 0,
    output: Sequence[int] = (),
    stops: tuple[int, ...] = (),
    **more: object,
) -> SlotAssignment:
    params = SamplingParams(grammar=grammar, **{"temperature": 0.0, **more})  # type: ignore[arg-type]
    return SlotAssignment(slot, params, stops, 2, 0, array("i", [1, 2, *output]))


def ids(masks: Masks, slot: int = 0) -> list[int]:
    allowed = masks.allowed(slot)
    assert allowed is not None
    return [int(token) for token in np.flatnonzero(allowed)]


def text(tokens: Sequence[int]) -> str:
    return "".join("ab" if token == AB else chr(token) for token in tokens)


def flat(rows: int = 1, **likes: float) -> Tensor:
    """Return logits of 0 but for `likes`, by letter (`a=2.0`) or by id (`t257=2.0`)."""
    logits = torch.zeros(rows, WIDTH)
    for name, value in likes.items():
        logits[:, int(name[1:]) if len(name) > 1 else ord(name)] = value
    return logits


def wait_for(holds: Sequence[object], state: GrammarState = GrammarState.READY) -> None:
    until_s = time.monotonic() + 20
    while any(hold.state is not state for hold in holds):  # type: ignore[attr-defined]
        assert time.monotonic() < until_s, "grammars are not compiled"
        time.sleep(0.002)


# What is allowed


def test_a_mask_allows_what_may_come_next_and_nothing_else(masks: Masks) -> None:
    masks.assign(assigned(WORD))
    masks.prepare([0])
    assert text(ids(masks)) == "ny"
    assert masks.consume(0, ord("y")) is Verdict.OPEN
    masks.prepare([0])
    assert text(ids(masks)) == "e"


def test_end_of_sequence_is_allowed_exactly_when_the_grammar_accepts(masks: Masks) -> None:
    masks.assign(assigned(LETTERS))
    assert not {EOS, OTHER_EOS} & set(ids(masks))
    masks.consume(0, ord("x"))
    assert {EOS, OTHER_EOS} <= set(ids(masks))


def test_the_verdict_is_complete_when_nothing_may_follow(masks: Masks) -> None:
    masks.assign(assigned(WORD))
    for letter in "no":
        assert masks.verdict(0) is Verdict.OPEN
        assert ord(letter) in ids(masks)
        masks.consume(0, ord(letter))
    assert masks.verdict(0) is Verdict.COMPLETE


def test_end_of_sequence_completes_what_could_go_on(masks: Masks) -> None:
    masks.assign(assigned(ENDLESS))
    masks.allowed(0)
    assert masks.consume(0, ord("a")) is Verdict.OPEN
    masks.allowed(0)
    assert masks.consume(0, OTHER_EOS) is Verdict.COMPLETE


@pytest.mark.parametrize("pattern", [r"(.|\n)*", r"\P{L}+"])
def test_no_text_allows_special_tokens_or_columns_beyond_the_vocabulary(masks: Masks, pattern: str) -> None:
    masks.assign(assigned(Grammar(GrammarKind.REGEX, pattern)))
    assert max(ids(masks)) < 260
    assert TOOL not in ids(masks)


def test_a_row_narrower_than_the_vocabulary_loses_what_it_has_no_column_for(cache: GrammarCache) -> None:
    narrow = Masks(cache, 100)
    narrow.assign(assigned(LETTERS))
    allowed = narrow.allowed(0)
    assert allowed is not None and len(allowed) == 100 and text(np.flatnonzero(allowed).tolist()) == "abc"
    assert narrow.eos_token_ids == []
    narrow.close()


def test_a_slot_without_a_grammar_has_no_mask_and_starts_no_thread(masks: Masks) -> None:
    before = threading.active_count()
    masks.assign(assigned(None))
    masks.prepare([0])
    assert (masks.holds(0), masks.verdict(0)) == (False, None)
    assert threading.active_count() == before


def test_a_slot_taken_by_a_sequence_without_a_grammar_is_free_of_the_old_one(masks: Masks) -> None:
    masks.assign(assigned(WORD))
    masks.prepare([0])
    masks.assign(assigned(None))
    assert not masks.holds(0)


# Preemption, batches


def test_a_slot_assigned_again_goes_on_where_its_output_ends(masks: Masks) -> None:
    masks.assign(assigned(LETTERS))
    for letter in "abc":
        ids(masks)
        masks.consume(0, ord(letter))
    there = ids(masks)
    masks.release(0)
    masks.assign(assigned(LETTERS, slot=3, output=[AB, ord("c")]))  # the same text in other tokens
    masks.prepare([3])
    assert ids(masks, 3) == there == [*range(ord("a"), ord("z") + 1), EOS, OTHER_EOS]


def test_each_slot_follows_its_own_grammar(masks: Masks) -> None:
    for slot, which in enumerate((LETTERS, WORD, ENDLESS, WORD)):
        masks.assign(assigned(which, slot))
    masks.prepare([0, 1, 2, 3])
    assert [text(ids(masks, slot)) for slot in (1, 2, 3)] == ["ny", "a", "ny"]
    masks.consume(1, ord("n"))
    masks.consume(3, ord("y"))
    masks.prepare([1, 3])
    assert [text(ids(masks, slot)) for slot in (3, 1)] == ["e", "o"]


def test_masks_prepared_for_a_step_that_failed_are_not_taken_for_the_next(masks: Masks) -> None:
    masks.assign(assigned(WORD, 0))
    masks.assign(assigned(ENDLESS, 1))
    masks.prepare([0, 1])
    masks.prepare([1])
    assert text(ids(masks, 0)) == "ny"
    assert text(ids(masks, 1)) == "a"


# Failures


def test_a_grammar_that_cannot_be_compiled_fails_its_slot_and_no_other(masks: Masks) -> None:
    masks.assign(assigned(BROKEN, 0))
    masks.assign(assigned(WORD, 1))
    masks.prepare([0, 1])
    assert masks.allowed(0) is None
    assert masks.verdict(0) is Verdict.FAILED
    assert text(ids(masks, 1)) == "ny"


def test_an_output_that_is_not_of_the_grammar_fails_when_it_is_replayed(masks: Masks) -> None:
    masks.assign(assigned(WORD, output=[ord("q")]))
    masks.prepare([0])
    assert masks.allowed(0) is None
    assert masks.verdict(0) is Verdict.FAILED


def test_a_token_that_is_not_allowed_fails_the_slot_for_good(masks: Masks) -> None:
    masks.assign(assigned(WORD))
    masks.allowed(0)
    assert masks.consume(0, ord("q")) is Verdict.FAILED
    masks.prepare([0])
    assert masks.allowed(0) is None


def test_a_slot_that_exceeds_the_bounds_fails_and_others_with_its_grammar_go_on(masks: Masks) -> None:
    masks.assign(assigned(RUNAWAY, 0))
    verdict = Verdict.OPEN
    for _ in range(400):
        masks.prepare([0])
        if masks.allowed(0) is None:
            break
        masks.consume(0, ord("a"))
    verdict = masks.verdict(0)
    assert verdict is Verdict.FAILED
    masks.assign(assigned(RUNAWAY, 1))
    masks.prepare([1])
    assert ord("a") in ids(masks, 1)
    assert masks.consume(1, ord("a")) is Verdict.OPEN


def test_a_lexer_filled_by_others_is_replaced_not_blamed_on_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {**grammars_module.PARSER_LIMITS, "max_lexer_states": 300}
    monkeypatch.setattr(grammars_module, "PARSER_LIMITS", few)
    cache = GrammarCache(byte_tokenizer(), [EOS])
    masks = Masks(cache, WIDTH)
    grammar = Grammar(GrammarKind.REGEX, "[ab]*a[ab]{12}c")
    hold = cache.prepare(grammar)
    wait_for([hold])
    rng = np.random.default_rng(3)
    for slot in range(12):  # each meets states of its own; all of them together are too many
        masks.assign(assigned(grammar, slot))
        for token in rng.choice([97, 98], 16):
            assert masks.allowed(slot) is not None, "a slot failed for what others did"
            masks.consume(slot, int(token))
    shared = cache.matcher(grammar)
    assert shared is not None and not shared.is_error()
    hold.release()
    masks.close()
    cache.close()


def test_a_thread_that_breaks_off_fails_what_it_was_computing(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks.assign(assigned(WORD, 0))
    masks.assign(assigned(WORD, 1))

    def broken(places: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(masks, "_compute", broken)
        masks.prepare([0])
        assert masks.allowed(0) is None
    assert text(ids(masks, 1)) == "ny"


def test_masks_are_computed_while_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's lock is free meanwhile: this thread counts while a mask of 0.1 s is made."""
    ample = {**grammars_module.PARSER_LIMITS, "max_items_in_row": 10**6, "step_max_items": 10**9}
    monkeypatch.setattr(grammars_module, "PARSER_LIMITS", ample)
    cache = GrammarCache(byte_tokenizer(), [EOS])
    masks = Masks(cache, WIDTH)
    begun = threading.Event()
    compute = masks._compute

    def watched(places: list[object]) -> None:
        begun.set()
        compute(places)  # type: ignore[arg-type]

    monkeypatch.setattr(masks, "_compute", watched)
    masks.assign(assigned(AMBIGUOUS, output=[97] * 250))
    masks.prepare([0])
    counted, filling = 0, masks._filling
    assert filling is not None and begun.wait(20)
    while not filling.done():
        counted += 1
        time.sleep(0.0002)
    assert masks.verdict(0) is Verdict.OPEN
    assert counted > 10
    masks.close()
    cache.close()


# Where grammars come from


def test_a_model_without_a_tokenizer_file_has_no_grammars() -> None:
    assert over(tiny_source("llama")) is None
    assert masks_over(None, WIDTH, 4) is None


@pytest.mark.parametrize("raw", [b"{}", b"/etc/hostname", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_file_that_cannot_be_used_leaves_a_model_without_grammars(raw: bytes) -> None:
    cache = GrammarCache(raw, [2])
    assert not cache.available
    assert masks_over(cache, WIDTH, 4) is None


def test_the_end_of_sequence_ids_are_those_of_the_model() -> None:
    files = {"tokenizer.json": byte_tokenizer(), "generation_config.json": b'{"eos_token_id": [258, 257]}'}
    files["config.json"] = tiny_source("llama").file("config.json") or b""
    cache = over(TinySource(files, {}))
    assert cache is not None and cache.available
    assert sorted(cache.tokenizer.eos_tokens) == [EOS, OTHER_EOS]
    cache.close()
