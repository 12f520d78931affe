"""The model that our engine gets in the bench: ready, in a copy, with memory for the largest workload."""

from __future__ import annotations

import math
from pathlib import Path

from tests.bench import prepared, workloads
from tests.bench.rounds import Contestant
from tests.bench.tiny_model import write_checkpoint


def test_a_copy_is_made_ready_once_and_the_given_directory_left_alone(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    said: list[str] = []
    made = prepared.ready(model, "int8-block", said.append, tmp_path / "cache")
    assert made != model and (made / "parts" / "ready-int8-block" / "manifest.json").is_file()
    assert (made / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert prepared.ready(model, "int8-block", said.append, tmp_path / "cache") == made
    assert said == ["making the model ready (once)"]
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_that_cannot_be_made_ready_is_used_as_it_is_and_said_to_be(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    assert prepared.ready(model, "none", print, tmp_path / "cache") == model
    (model / "model.safetensors").write_bytes(b"no weights")
    said: list[str] = []
    assert prepared.ready(model, "int8-block", said.append, tmp_path / "cache") == model
    assert "not made ready" in said[-1]


def test_the_sealed_form_has_its_own_package_and_keys_and_leaves_neither(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    plain = Contestant("ours http", "ours_http", Path("python"), model, {"quantize": "none"})
    with prepared.sealed(plain, lambda _: None) as sealed:
        key = Path(sealed.options["key"].removeprefix("file:"))
        assert (sealed.name, sealed.options["quantize"]) == ("ours http sealed", "none")
        assert (sealed.model / "manifest.json").is_file() and key.stat().st_mode & 0o077 == 0
        assert sealed.options["vendor_roots"].startswith("ed25519:")
    assert not key.exists() and not sealed.model.exists() and list(tmp_path.iterdir()) == [model]


def test_keys_and_values_have_room_for_the_largest_workload(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "tiny")
    elements = 2 * 2 * 1 * 32  # keys and values, layers, heads, width
    assert prepared.kv_mib(model) == math.ceil(prepared.KV_TOKENS * elements * 4 / 2**20)
    text = workloads.read_text(model)
    largest = workloads.requests("W3", text, 1, quick=False)
    assert sum(len(r.prompt) + r.output_tokens for r in largest) + 16 * len(largest) <= prepared.KV_TOKENS
