"""Seeded checkpoints are the same everywhere, whole, and servable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import seeded
from tests.bench.tiny_model import write_checkpoint

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "demo")


def test_a_seeded_model_is_the_same_each_time_and_takes_the_tokenizers_vocabulary(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(seeded.SHAPES, "tiny", {**seeded.SHAPES["qwen3-0.6b"], **TINY})
    first = seeded.ensure("tiny", demo, tmp_path / "a")
    second = seeded.ensure("tiny", demo, tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    config = json.loads((first / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["dtype"]) == ("qwen3", 320, "float32")
    assert (first / "tokenizer.json").read_bytes() == (demo / "tokenizer.json").read_bytes()


def test_a_write_that_broke_off_leaves_nothing_that_looks_whole(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(seeded.SHAPES, "tiny", {**seeded.SHAPES["qwen3-0.6b"], **TINY})
    (demo / "tokenizer.json").unlink()
    (demo / "tokenizer.json").mkdir()  # copying it fails
    with pytest.raises(OSError, match="tokenizer"):
        seeded.ensure("tiny", demo, tmp_path / "a")
    assert not (tmp_path / "a" / "seeded-tiny").exists()
