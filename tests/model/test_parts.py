"""Parts made beforehand: found by a start with the same choices, whole or not there, refused when unfit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from container.model import parts, shape
from container.model.errors import LoadError
from container.model.facts import ModelFacts
from container.model.folders import PlainFolder
from container.model.group import Group
from container.model.quantize_choose import Scheme
from container.model.quantize_modules import plain_activations
from container.model.rows import PackedRow
from container.model.runner import NativeRunner
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource, SourceError
from container.model.start import build_runner
from tests.model.ranks import together
from tests.model.test_ranks_quantized import aligned_source

CONFIG = RunnerConfig(sequence_tokens=64, running_limit=2, step_tokens=64, kv_mib=4, threads=1)
TOKENS = [5, 9, 11, 4, 8, 33, 2, 90]


def test_parts_made_with_surgery_serve_a_start_that_asks_for_it_and_no_other(model: Path) -> None:
    fused = replace(CONFIG, quantize="int8-block", surgery="on")
    at_load, facts = computed(fused, model, 1)
    assert facts.fused["qkv"] == 2
    parts.make(model, 1, "int8-block", fuse="on")
    fused = replace(fused, parts_dir=str(model / "parts"))
    from_parts, facts = computed(fused, model, 1)
    assert facts.fused["qkv"] == 2
    assert torch.equal(from_parts, at_load)
    with pytest.raises(LoadError, match="the parts were made with another `fused`"):
        computed(replace(fused, surgery="off"), model, 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with experts on disk, its widths whole blocks on two ranks."""
    directory = tmp_path / "model"
    directory.mkdir()
    source = aligned_source("mixtral")
    (directory / "config.json").write_bytes(source.file("config.json") or b"")
    save_file(
        {name: tensor.contiguous() for name, tensor in source.tensors()}, directory / "model.safetensors"
    )
    return directory


def computed(config: RunnerConfig, model: Path, size: int) -> tuple[Tensor, ModelFacts]:
    """Return rank 0's (tokens, vocabulary) logits and the facts."""

    def run(group: Group | None) -> tuple[Tensor | None, ModelFacts]:
        runner, facts = build_runner(config, DirectorySource(model), lambda phrase: None, group)
        assert isinstance(runner, NativeRunner)
        with plain_activations():
            return runner.packed.logits([PackedRow(0, 0, TOKENS, range(len(TOKENS)))]), facts

    logits, facts = run(None) if size == 1 else together(size, run)[0]
    assert logits is not None
    return logits, facts


@pytest.mark.parametrize(
    ("size", "scheme"), [(1, "int8-block"), (2, "none"), (2, "int4-block"), (2, "bnb-nf4")]
)
def test_a_start_takes_the_parts_made_for_it_and_computes_the_same(
    model: Path, size: int, scheme: str
) -> None:
    config = replace(CONFIG, quantize=scheme, dtype="float32")
    at_load, _ = computed(config, model, size)
    made = parts.make(model, size, scheme)
    assert made.folder == model / "parts" / f"tp{size}-{scheme}" and made.quantization == scheme
    assert sorted(path.name for path in made.folder.iterdir()) == sorted(
        ["manifest.json", *(f"model-rank-{rank}-of-{size}.safetensors" for rank in range(size))]
    )
    (model / "model.safetensors").unlink()  # nothing but the parts is left to load
    from_parts, facts = computed(replace(config, parts_dir=str(model / "parts")), model, size)
    assert torch.equal(from_parts, at_load)
    assert facts.quantize == scheme


MACHINES = {"float32": frozenset({"avx2"}), "bfloat16": frozenset({"avx512_bf16"})}  # by what `auto` is there


def stored_as(model: Path, *dtypes: torch.dtype) -> None:
    """Give the checkpoint's tensors these dtypes in turn."""
    path = model / "model.safetensors"
    tensors = sorted(load_file(path).items())
    kept = {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(tensors)}
    save_file(kept, path)


@pytest.mark.parametrize(
    ("checkpoint", "recorded"),
    [
        ([torch.bfloat16], "bfloat16"),
        ([torch.float32], "float32"),
        ([torch.float16], "float32"),
        ([torch.bfloat16, torch.float32], "float32"),
    ],
)
@pytest.mark.parametrize(("size", "scheme"), [(2, "none"), (2, "int8-block"), (2, "bnb-nf4")])
def test_what_is_written_depends_on_the_checkpoint_s_dtype_and_not_on_the_machine_s(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: list[torch.dtype],
    recorded: str,
    size: int,
    scheme: str,
) -> None:
    stored_as(model, *checkpoint)
    written = []
    for machine, flags in MACHINES.items():
        monkeypatch.setattr(shape, "cpu_flags", lambda flags=flags: flags)
        folder = parts.make(model, size, scheme, out=tmp_path / machine).folder
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert json.loads(written[0]["manifest.json"])["dtype"] == recorded


@pytest.mark.parametrize(
    ("checkpoint", "computed_in", "size", "scheme"),
    [
        (torch.bfloat16, "bfloat16", 2, "none"),
        (torch.bfloat16, "float32", 2, "none"),
        (torch.float32, "bfloat16", 2, "none"),
        (torch.bfloat16, "bfloat16", 2, "int8-block"),
        (torch.bfloat16, "float32", 2, "int8-block"),
        (torch.bfloat16, "float32", 1, "int4-block"),
        (torch.bfloat16, "float32", 2, "bnb-nf4"),
    ],
)
def test_a_start_computes_from_parts_in_its_own_dtype_what_it_computes_from_the_weights(
    model: Path, size: int, scheme: str, checkpoint: torch.dtype, computed_in: str
) -> None:
    stored_as(model, checkpoint)
    config = replace(CONFIG, quantize=scheme, dtype=computed_in)
    at_load, _ = computed(config, model, size)
    parts.make(model, size, scheme)
    (model / "model.safetensors").unlink()
    from_parts, facts = computed(replace(config, parts_dir=str(model / "parts")), model, size)
    assert facts.dtype == computed_in
    assert torch.equal(from_parts, at_load)


def test_parts_for_other_choices_are_left_alone(model: Path) -> None:
    parts.make(model, 2, "int4-block")
    root = model / "parts"
    assert parts.found(PlainFolder(root), 2, Scheme.INT4_BLOCK) is not None
    assert parts.found(PlainFolder(root), 2, Scheme.NONE) is None
    assert parts.found(PlainFolder(root), 3, Scheme.INT4_BLOCK) is None
    assert parts.found(None, 2, Scheme.INT4_BLOCK) is None
    plain, _ = computed(CONFIG, model, 1)
    beside, _ = computed(replace(CONFIG, parts_dir=str(root)), model, 1)
    assert torch.equal(plain, beside)


def test_parts_that_were_changed_stop_the_start(model: Path) -> None:
    part = parts.make(model, 1, "int8-block").folder / "model-rank-0-of-1.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    config = replace(CONFIG, quantize="int8-block", parts_dir=str(model / "parts"))
    with pytest.raises(LoadError, match="not the one its manifest names"):
        computed(config, model, 1)


def test_parts_of_weights_that_were_exchanged_stop_the_start(model: Path) -> None:
    parts.make(model, 1, "int8-block")
    config = replace(CONFIG, quantize="int8-block", parts_dir=str(model / "parts"))
    computed(config, model, 1)
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, model / "model.safetensors")
    with pytest.raises(LoadError, match="another `source_sha256`"):
        computed(config, model, 1)


def test_a_directory_without_weights_serves_its_parts_and_nothing_else(model: Path) -> None:
    parts.make(model, 1, "int8-block")
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no unquantized weights, and no parts"):
        computed(replace(CONFIG, parts_dir=str(model / "parts")), model, 1)


def test_parts_are_there_whole_or_not_at_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(parts, "save_shards", fail)
        with pytest.raises(OSError, match="full"):
            parts.make(model, 2, "none")
    assert list((model / "parts").iterdir()) == []
    parts.make(model, 2, "none")
    with pytest.raises(FileExistsError):
        parts.make(model, 2, "none")


def test_the_command_makes_parts_and_says_how_large_they_are(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--tensor-parallel", "2"]
    assert parts.main([*arguments, "--quantize", "int8-block"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert Path(shown["folder"]).name == "tp2-int8-block" and shown["quantization"] == "int8-block"
    assert len(shown["part_bytes"]) == 2 and min(shown["part_bytes"]) > 10_000
    assert parts.main([*arguments, "--quantize", "int8-block"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert parts.main(["--model", str(model), "--tensor-parallel", "65"]) == 2
    assert parts.main(["--model", str(model), "--tensor-parallel", "3"]) == 2
    assert "4 attention heads cannot be divided among 3 ranks" in capsys.readouterr().err
    assert parts.main([*arguments, "--quantize", "fp8"]) == 2
    assert "compute capability" in capsys.readouterr().err


def test_parts_can_be_made_elsewhere_and_are_read_by_whoever_reads_the_model(
    model: Path, tmp_path: Path
) -> None:
    (model / "config.json").chmod(0o640)
    made = parts.make(model, 2, "none", out=tmp_path / "elsewhere")
    assert made.folder == tmp_path / "elsewhere" / "tp2-none" and not (model / "parts").exists()
    assert {path.stat().st_mode & 0o777 for path in made.folder.iterdir()} == {0o640}
