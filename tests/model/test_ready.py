"""Decoders made ready: they answer as a start from the weights does, or they do not serve."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from container.kernels.block_weight import ARRANGEMENT
from container.model import fused_model, parts, ready, ready_files
from container.model.facts import ModelFacts
from container.model.folders import PlainFolder
from container.model.quantize_choose import QuantizeRefused
from container.model.ready_files import NotReady
from container.model.rows import PackedRow
from container.model.runner import NativeRunner
from container.model.shape import RunnerConfig, SizingError
from container.model.source import DirectorySource, SourceError, file_sha256
from container.model.start import build_runner
from tests.model.test_positions import ROPES
from tests.model.tiny import TinySource, tiny_source

FUSED = ("llama", "qwen2", "qwen3", "mistral")
CONFIG = RunnerConfig(
    sequence_tokens=64, running_limit=2, step_tokens=64, kv_mib=4, threads=1, quantize="int8-block"
)
TOKENS = [5, 9, 11, 4, 8, 33, 2, 90, 17, 3, 60, 41]  # longer than a tiny model's window


def directory(tmp_path: Path, source: TinySource) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(source.file("config.json") or b"")
    save_file({name: each.contiguous() for name, each in source.tensors()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return directory(tmp_path, tiny_source("llama"))


def started(model: Path, **changes: Any) -> tuple[Tensor, ModelFacts]:
    """Return the logits (tokens, vocabulary) of a start with whatever lies in the model's parts."""
    config = replace(CONFIG, parts_dir=str(model / "parts"), **changes)
    runner, facts = build_runner(config, DirectorySource(model), lambda phrase: None)
    assert isinstance(runner, NativeRunner)
    logits = runner.packed.logits([PackedRow(0, 0, TOKENS, range(len(TOKENS)))])
    runner.close()
    assert logits is not None
    return torch.as_tensor(logits), facts


def was_ready(facts: ModelFacts) -> bool:
    return "made ready" in facts.quantized


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a ready decoder, and its manifest with them."""
    tensors = load_file(folder / ready_files.TENSORS)
    change(tensors)
    save_file(tensors, folder / ready_files.TENSORS)
    told(folder, tensors_sha256=file_sha256(folder / ready_files.TENSORS))


def _halved(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name][::2].clone()})


def _seen_as(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name].view(dtype)})


def told(folder: Path, **changes: Any) -> None:
    """Change the manifest of a ready decoder."""
    path = folder / ready_files.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("scheme", ["int8-block", "int4-block"])
@pytest.mark.parametrize("kind", FUSED)
def test_a_ready_decoder_answers_as_the_weights_it_was_made_from(
    kind: str, scheme: str, tmp_path: Path
) -> None:
    model = directory(tmp_path, tiny_source(kind))
    from_weights, facts = started(model, quantize=scheme)
    assert facts.operators == "fused" and not was_ready(facts)
    made = parts.make(model, 1, scheme)
    assert made.folder == model / "parts" / f"ready-{scheme}" and made.quantization == scheme
    from_ready, facts = started(model, quantize=scheme)
    assert was_ready(facts) and torch.equal(from_ready, from_weights)
    assert facts.architecture and facts.eos_token_ids == (2,) and facts.operators == "fused"
    assert facts.quantize == scheme
    (model / "model.safetensors").unlink()  # nothing but the ready decoder is left
    alone, facts = started(model, quantize=scheme)
    assert was_ready(facts) and torch.equal(alone, from_weights)


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_scaled_rotations_are_the_models_own(rope: str, tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama", rope_parameters=ROPES[rope]))
    from_weights, _ = started(model)
    parts.make(model, 1, "int8-block")
    from_ready, facts = started(model)
    assert was_ready(facts)
    assert torch.equal(from_ready, from_weights)


def test_rotations_that_depend_on_the_length_are_not_made_ready(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama", rope_parameters=ROPES["dynamic"]))
    assert parts.make(model, 1, "int8-block").folder.name == "tp1-int8-block"
    assert not was_ready(started(model)[1])


def test_a_model_of_another_form_gets_parts_of_the_usual_kind(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("gemma"))
    assert parts.make(model, 1, "int8-block").folder.name == "tp1-int8-block"


@pytest.mark.parametrize("scheme", ["int8-block", "int4-block"])
def test_a_start_from_a_ready_decoder_imports_neither_torch_nor_transformers(
    scheme: str, model: Path
) -> None:
    code = (
        "import sys\n"
        "from container.ranks.assembly import load\n"
        "from container.ranks.config import EngineConfig\n"
        "told = EngineConfig(model_dir=sys.argv[1], quantize=sys.argv[2], kv_mib=4, sequence_tokens=64)\n"
        "assert 'made ready' in load(told, lambda phase: None).summary\n"
        "print({'torch', 'transformers'} & sys.modules.keys())\n"
    )
    command = [sys.executable, "-c", code, str(model), scheme]
    assert subprocess.run(command, capture_output=True, text=True).returncode != 0  # not made yet
    parts.make(model, 1, scheme)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"quantize": "none"}, {"quantize": "int4-block"}, {"surgery": "on"}]
)
def test_other_choices_start_from_the_weights(changes: dict[str, Any], model: Path) -> None:
    parts.make(model, 1, "int8-block")
    assert not was_ready(started(model, **changes)[1])


def test_each_scheme_finds_its_own_decoder_and_auto_the_one_of_eight_bits(model: Path) -> None:
    parts.make(model, 1, "int4-block")
    assert not was_ready(started(model)[1]) and not was_ready(started(model, quantize="auto")[1])
    parts.make(model, 1, "int8-block")
    for setting, scheme in (("auto", "int8-block"), ("int8-block",) * 2, ("int4-block",) * 2):
        facts = started(model, quantize=setting)[1]
        assert was_ready(facts) and facts.quantize == scheme


def test_a_decoder_of_another_scheme_than_its_folder_says_stops_the_start(model: Path) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    folder.rename(folder.with_name("ready-int4-block"))
    with pytest.raises(NotReady, match="not of the scheme"):
        started(model, quantize="int4-block")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("layers.1.down.lows"), "another shape"),  # values of int8 then
        (lambda tensors: tensors.update({"head.lows": tensors["head.scales"].clone()}), "another shape"),
        (_halved("layers.0.qkv.lows"), "another shape"),
        (_halved("layers.0.qkv.values"), "another shape"),
        (_seen_as("layers.0.qkv.values", torch.int8), "another shape"),
        (_seen_as("layers.0.qkv.lows", torch.bfloat16), "another shape"),
    ],
)
def test_int4_tensors_of_another_shape_never_reach_the_operators(
    change: Callable[[dict[str, Tensor]], object], words: str, model: Path
) -> None:
    changed(parts.make(model, 1, "int4-block").folder, change)
    with pytest.raises(NotReady, match=words):
        started(model, quantize="int4-block")


def test_without_native_operators_the_weights_serve(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.make(model, 1, "int8-block")
    monkeypatch.setattr(ready, "native_operators", lambda: False)
    assert not was_ready(started(model)[1])


@pytest.mark.parametrize("setting", ["format", "arrangement"])
def test_a_decoder_of_another_form_is_left_alone(setting: str, model: Path) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    told(folder, **{setting: 2, "something": "new"})
    assert not was_ready(started(model)[1])


def test_other_weights_beside_a_ready_decoder_stop_the_start(model: Path) -> None:
    parts.make(model, 1, "int8-block")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, model / "model.safetensors")
    with pytest.raises(NotReady, match="other weights"):
        started(model)


def test_a_flipped_bit_stops_the_start(model: Path) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    raw = bytearray((folder / ready_files.TENSORS).read_bytes())
    raw[-1] ^= 1
    (folder / ready_files.TENSORS).write_bytes(raw)
    with pytest.raises(NotReady, match="not those its manifest names"):
        started(model)


def test_a_decoder_that_answers_otherwise_here_does_not_serve(model: Path) -> None:
    """As on a machine whose operators compute something else: its references are another model's."""
    folder = parts.make(model, 1, "int8-block").folder
    changed(folder, lambda tensors: tensors["reference.1"].mul_(1.01))
    from_weights, facts = started(model)
    assert not was_ready(facts) and from_weights.isfinite().all()
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no unquantized weights, and no parts"):
        started(model)


def test_overflowing_activations_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.make(model, 1, "int8-block")
    verify = fused_model.verify
    monkeypatch.setattr(ready, "verify", lambda *given: replace(verify(*given), finite=False))  # type: ignore[type-var]
    with pytest.raises(QuantizeRefused, match="overflow"):
        started(model)


def test_memory_and_windows_bound_a_ready_decoder_as_any_other(model: Path) -> None:
    parts.make(model, 1, "int8-block")
    with pytest.raises(SizingError, match="window is 512"):
        started(model, sequence_tokens=513)
    with pytest.raises(SizingError, match="memory for keys and values"):
        started(model, sequence_tokens=512, kv_mib=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("layers.1.down.scales"), "lacks a tensor"),
        (lambda tensors: tensors.pop("layers.0.attention_norm"), "lacks a tensor"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "more tensors"),
        (lambda tensors: tensors.update(last_norm=torch.zeros(63)), "another shape or kind"),
        (lambda tensors: tensors.update(cosines=torch.zeros(512, 7)), "another shape or kind"),
        (lambda tensors: tensors.update(sines=torch.zeros(511, 8)), "another shape or kind"),
        (lambda tensors: tensors.update(last_norm=tensors["last_norm"].bfloat16()), "another shape or kind"),
        (
            lambda tensors: tensors.update({"head.values": tensors["head.values"][:-1].clone()}),
            "another shape",
        ),
        (lambda tensors: tensors.update({"head.scales": tensors["head.scales"].float()}), "another shape"),
        (lambda tensors: tensors.update(embedding=tensors["embedding"].double()), "another shape"),
        (lambda tensors: tensors.update({"layers.0.qkv.bias": torch.zeros(7)}), "another shape"),
        (lambda tensors: tensors.update({"reference.0": torch.zeros(13, 95)}), "another shape"),
    ],
)
def test_tensors_of_another_shape_never_reach_the_operators(
    change: Callable[[dict[str, Tensor]], object], words: str, model: Path
) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    changed(folder, change)
    with pytest.raises(NotReady, match=words):
        started(model)


ATTENTION = {"heads": 4, "kv_heads": 2, "dim": 16, "scale": 0.25, "window": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": [ATTENTION] * 1025},
        {"layers": [ATTENTION | {"kv_heads": 3}] * 2},
        {"layers": [ATTENTION | {"dim": 7}] * 2},
        {"layers": [ATTENTION | {"window": 0}] * 2},
        {"layers": [ATTENTION] * 3},
        {"layers": [ATTENTION | {"more": 1}] * 2},
        {"gate": 2},
        {"gate": "silu"},
        {"hidden": 63},
        {"vocabulary": 97},
        {"intermediate": 128},
        {"probe": [[1, 2], [3]]},
        {"probe": []},
        {"epsilon": None},
        {"positions": 511},
        {"longest_tokens": 513},
        {"rotated": 8},
        {"unknown": 1},
    ],
)
def test_a_manifest_that_describes_another_decoder_stops_the_start(
    changes: dict[str, Any], model: Path
) -> None:
    told(parts.make(model, 1, "int8-block").folder, **changes)
    with pytest.raises(NotReady):
        started(model)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"format":1}', b'{"format":1,"arrangement":1}'])
def test_a_manifest_that_cannot_be_read_stops_the_start(raw: bytes, model: Path) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    (folder / ready_files.MANIFEST).write_bytes(raw)
    with pytest.raises(NotReady, match="manifest"):
        started(model)


def test_a_manifest_is_read_up_to_its_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    size = (folder / ready_files.MANIFEST).stat().st_size
    monkeypatch.setattr(ready_files, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(SourceError, match="too large"):
        started(model)


def test_what_was_begun_and_not_finished_is_not_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(ready_files, "save_file", fail)
        with pytest.raises(OSError, match="full"):
            parts.make(model, 1, "int8-block")
    assert list((model / "parts").iterdir()) == []
    parts.make(model, 1, "int8-block")
    with pytest.raises(FileExistsError):
        parts.make(model, 1, "int8-block")


def test_an_embedding_is_stored_in_half_only_where_that_loses_nothing(model: Path) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    assert load_file(folder / ready_files.TENSORS)["embedding"].dtype == torch.float32
    halves = {name: each.half() for name, each in load_file(model / "model.safetensors").items()}
    save_file(halves, model / "model.safetensors")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    from_weights, _ = started(model)
    folder = parts.make(model, 1, "int8-block").folder
    assert load_file(folder / ready_files.TENSORS)["embedding"].dtype == torch.float16
    from_ready, facts = started(model)
    assert was_ready(facts) and torch.equal(from_ready, from_weights)


def test_the_manifest_says_what_the_operators_read(model: Path) -> None:
    folder = parts.make(model, 1, "int8-block").folder
    manifest = ready_files.read_manifest(PlainFolder(folder))
    assert manifest is not None and manifest.arrangement == ARRANGEMENT
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=ready_files.Manifest) == manifest
    assert [(each.heads, each.kv_heads, each.dim) for each in manifest.layers] == [(4, 2, 16)] * 2
