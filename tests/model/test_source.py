"""A model directory is read by plain names only, and nothing in it is executed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from container.model.source import (
    INDEX,
    WEIGHTS,
    DirectorySource,
    SourceError,
    read_json,
    refuse_remote_code,
)


def model_dir(path: Path, config: object = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, path / WEIGHTS)
    return path


def sharded(path: Path, weight_map: object) -> Path:
    model_dir(path)
    (path / WEIGHTS).rename(path / "part-1.safetensors")
    save_file({"c": torch.zeros(1)}, path / "part-2.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def read(source: DirectorySource) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in source.stored()}


def test_a_single_file_gives_every_tensor(tmp_path: Path) -> None:
    source = DirectorySource(model_dir(tmp_path))
    tensors = read(source)
    assert sorted(tensors) == ["a", "b"]
    assert torch.equal(tensors["a"], torch.arange(3.0))


def test_an_index_gives_the_tensors_of_all_its_files(tmp_path: Path) -> None:
    names = {"a": "part-1.safetensors", "b": "part-1.safetensors", "c": "part-2.safetensors"}
    assert sorted(read(DirectorySource(sharded(tmp_path, names)))) == ["a", "b", "c"]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path, {"a": "part-1.safetensors", "c": "part-2.safetensors"})
    save_file({"a": torch.zeros(1)}, path / "part-2.safetensors")
    with pytest.raises(SourceError, match="twice"):
        read(DirectorySource(path))


def test_a_missing_optional_file_is_none(tmp_path: Path) -> None:
    source = DirectorySource(model_dir(tmp_path))
    assert source.file("generation_config.json") is None
    assert read_json(source, "generation_config.json") is None


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/hostname", "a/b.json", "", ".", "..", "a\\b", "a\0b"]
)
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    source = DirectorySource(model_dir(tmp_path / "model"))
    with pytest.raises(SourceError, match="path"):
        source.file(name)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "deep/part.safetensors"])
def test_an_index_cannot_name_a_path(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    path = sharded(tmp_path / "model", {"a": name})
    with pytest.raises(SourceError, match="path"):
        DirectorySource(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickled_weights_in_an_index_are_refused(tmp_path: Path, suffix: str) -> None:
    path = sharded(tmp_path, {"a": "weights" + suffix})
    (path / ("weights" + suffix)).write_bytes(b"")
    with pytest.raises(SourceError, match="pickled"):
        DirectorySource(path)


def test_a_directory_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    path = model_dir(tmp_path)
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="pickled"):
        DirectorySource(path)


def test_a_weights_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not safetensors"):
        DirectorySource(sharded(tmp_path, {"a": "weights.npz"}))


def test_a_weights_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="missing"):
        DirectorySource(sharded(tmp_path, {"a": "part-9.safetensors"}))


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_without_a_usable_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(SourceError, match="weight_map"):
        DirectorySource(sharded(tmp_path, weight_map))


def test_broken_weights_are_refused_without_their_content(tmp_path: Path) -> None:
    path = model_dir(tmp_path)
    (path / WEIGHTS).write_bytes(b"secret" * 100)
    with pytest.raises(SourceError) as caught:
        read(DirectorySource(path))
    assert "secret" not in str(caught.value)


def test_a_link_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    path = model_dir(tmp_path / "model")
    (tmp_path / "outside.json").write_text("{}")
    (path / "generation_config.json").symlink_to(tmp_path / "outside.json")
    source = DirectorySource(path)
    with pytest.raises(SourceError, match="leaves"):
        source.file("generation_config.json")


def test_weights_behind_a_link_that_leaves_the_directory_are_refused(tmp_path: Path) -> None:
    path = model_dir(tmp_path / "model")
    (path / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (path / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(SourceError, match="leaves"):
        DirectorySource(path)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    path = model_dir(tmp_path)
    (path / "real.json").write_text("{}")
    (path / "generation_config.json").symlink_to("real.json")
    assert DirectorySource(path).file("generation_config.json") == b"{}"


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = model_dir(tmp_path)
    (path / "tokenizer.json").mkdir()
    with pytest.raises(SourceError, match="regular"):
        DirectorySource(path).file("tokenizer.json")


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_and_not_passed_over(tmp_path: Path, beside: bool) -> None:
    path = model_dir(tmp_path)
    if not beside:
        (path / "config.json").unlink()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(SourceError, match="adapters are not served\nhint: merge it"):
        DirectorySource(path)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"text_config": {"auto_map": {"AutoConfig": "c.C"}}},
        {"parts": [{"auto_map": {"AutoConfig": "c.C"}}]},
        {"trust_remote_code": True},
        {"custom_pipelines": {"x": {"impl": "p.P"}}},
    ],
)
def test_a_configuration_with_code_of_its_own_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(SourceError, match="code"):
        refuse_remote_code(config)
    with pytest.raises(SourceError, match="code"):
        DirectorySource(model_dir(tmp_path, config))


@pytest.mark.parametrize("text", ["{", "[]", "3", "\udcff"])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = model_dir(tmp_path)
    (path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match="JSON"):
        DirectorySource(path)


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="exist"):
        DirectorySource(tmp_path / "absent")


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        DirectorySource(tmp_path)
