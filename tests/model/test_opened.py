"""A model that somebody opens for us: the same tensors as from a directory, and no way to more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from container.model import parts
from container.model.facts import ModelFacts
from container.model.opened import OpenedSource, Unopened
from container.model.rows import PackedRow
from container.model.runner import NativeRunner
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource, SourceError
from container.model.start import build_runner
from tests.model.ranks import together
from tests.model.test_ranks_quantized import aligned_source
from tests.model.test_ready import directory
from tests.model.tiny import tiny_source

CONFIG = RunnerConfig(
    sequence_tokens=64, running_limit=2, step_tokens=64, kv_mib=4, threads=1, quantize="int8-block"
)
TOKENS = [5, 9, 11, 4, 8, 33, 2, 90]
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8", torch.bfloat16: "BF16"}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32"}


class Refused(Exception):
    """What this opener raises."""


@dataclass
class Fake:
    """A tensor held in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes
    opener: FakeOpener

    @property
    def data_bytes(self) -> int:
        return len(self.content)

    def read_into(self, memory: memoryview) -> None:
        self.opener.read.append(self.name)
        if self.opener.damaged:
            raise Refused("damaged\nhint: copy it again")
        assert len(memory) == len(self.content) and memory.format == "B"
        memory[:] = self.content


@dataclass
class FakeOpener:
    """The files of a directory, as an opened package would hand them out."""

    root: Path
    refuses: type[Exception] = Refused
    damaged: bool = False
    read: list[str] = field(default_factory=list)

    def file(self, name: str) -> bytes | None:
        if self.damaged and name == "config.json":
            raise Refused("damaged\nhint: copy it again")
        path = self.root / name
        return path.read_bytes() if path.is_file() and path.suffix != ".safetensors" else None

    def tensor_files(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*.safetensors"))

    def tensors(self, name: str) -> Iterator[Fake]:
        for key, tensor in load_file(self.root / name).items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            yield Fake(key, NAMES[tensor.dtype], tuple(tensor.shape), raw, self)


def taken(source: Any) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in source.stored()}


def test_tensors_of_every_kind_are_those_of_the_directory(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "d": torch.tensor(5, dtype=torch.int64),
        "e": torch.empty(0, 3),
        "f": torch.arange(9, dtype=torch.uint8),
    }
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    opened, plain = taken(OpenedSource(FakeOpener(tmp_path))), taken(DirectorySource(tmp_path))
    assert set(opened) == set(plain) == set(tensors)
    for name, tensor in plain.items():
        assert opened[name].dtype == tensor.dtype and opened[name].shape == tensor.shape
        assert opened[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    opener = FakeOpener(directory(tmp_path, tiny_source("llama")))
    stored = dict(OpenedSource(opener).stored())
    assert stored and not opener.read
    name = next(iter(stored))
    stored[name].read()
    assert opener.read == [name]


def test_an_index_names_the_files_and_others_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("one", "two", "three"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(taken(OpenedSource(FakeOpener(tmp_path)))) == {"one", "two"}
    index["weight_map"]["four"] = "four.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="a weights file is missing"):
        OpenedSource(FakeOpener(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"), [(None, "no `config.json`"), ('{"auto_map": {"a": "b"}}', "code of its own")]
)
def test_a_configuration_is_demanded_and_runs_no_code(tmp_path: Path, config: str | None, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match=said):
        OpenedSource(FakeOpener(tmp_path))


def test_a_sealed_adapter_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama"))
    OpenedSource(FakeOpener(model))
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(SourceError, match="adapters are not served\nhint: merge it"):
        OpenedSource(FakeOpener(model))


def test_what_the_opener_refuses_is_said_in_its_own_words(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama"))
    with pytest.raises(Unopened, match="damaged\nhint: copy it again"):
        OpenedSource(FakeOpener(model, damaged=True))
    opener = FakeOpener(model)
    source = OpenedSource(opener)
    opener.damaged = True
    with pytest.raises(Unopened, match="damaged"):
        taken(source)
    opener.damaged = False
    source = OpenedSource(opener)

    class Late(FakeOpener):
        def tensors(self, name: str) -> Iterator[Fake]:
            self.damaged = True
            return super().tensors(name)

    with pytest.raises(Unopened, match="damaged"):  # also through transformers, which wraps what it meets
        started(Late(model), quantize="none")


def started(opener: FakeOpener, **changes: Any) -> tuple[Tensor, ModelFacts]:
    runner, facts = build_runner(replace(CONFIG, **changes), OpenedSource(opener), lambda phrase: None)
    assert isinstance(runner, NativeRunner)
    logits = runner.packed.logits([PackedRow(0, 0, TOKENS, range(len(TOKENS)))])
    runner.close()
    return torch.as_tensor(logits), facts


def test_a_ready_decoder_is_read_from_the_opener_and_the_weights_are_not(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama"))
    weights = FakeOpener(model)
    from_weights, facts = started(weights)
    assert "made ready" not in facts.quantized and weights.read
    parts.make(model, 1, "int8-block")
    ready = FakeOpener(model)
    from_ready, facts = started(ready)
    assert "made ready" in facts.quantized and torch.equal(from_ready, from_weights)
    assert not set(ready.read) & set(load_file(model / "model.safetensors"))
    assert len(ready.read) == len(set(ready.read)), "each is read once"


def test_a_ready_decoder_alone_is_enough(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama"))
    parts.make(model, 1, "int8-block")
    (model / "model.safetensors").unlink()
    assert "made ready" in started(FakeOpener(model))[1].quantized


def test_a_ready_decoder_with_a_tensor_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = directory(tmp_path, tiny_source("llama"))
    folder = parts.make(model, 1, "int8-block").folder
    tensors = load_file(folder / "decoder.safetensors")
    tensors["last_norm"] = tensors["last_norm"].to(torch.float16)
    save_file(tensors, folder / "decoder.safetensors")
    with pytest.raises(Exception, match="another shape or kind"):
        started(FakeOpener(model))


def test_each_rank_reads_its_own_part_and_no_other(tmp_path: Path) -> None:
    model = directory(tmp_path, aligned_source("llama"))
    plain = RunnerConfig(sequence_tokens=64, running_limit=2, step_tokens=64, kv_mib=4, threads=1)
    parts.make(model, 2, "none")

    class Counting(FakeOpener):
        def tensors(self, name: str) -> Iterator[Fake]:
            files.append(name)
            return super().tensors(name)

    def rank(group: Any) -> Tensor | None:
        runner, _ = build_runner(plain, OpenedSource(Counting(model)), lambda phrase: None, group)
        assert isinstance(runner, NativeRunner)
        logits = runner.packed.logits([PackedRow(0, 0, TOKENS, range(len(TOKENS)))])
        return None if logits is None else torch.as_tensor(logits)

    files: list[str] = []
    logits = together(2, rank)[0]
    assert logits is not None and np.isfinite(logits.numpy()).all()
    assert sorted(files) == [f"parts/tp2-none/model-rank-{rank}-of-2.safetensors" for rank in range(2)]
