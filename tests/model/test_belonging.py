"""Parts are of the weights they are sealed with: asked before the seal, and held to by whoever opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from container.model import belonging, parts
from container.model.errors import LoadError
from container.model.group import Group
from container.model.opened import OpenedSource
from container.model.shape import RunnerConfig
from container.model.source import WEIGHTS_DIGEST, DirectorySource, SourceError
from container.model.start import build_runner
from tests.model.ranks import together
from tests.model.test_opened import CONFIG, FakeOpener, started
from tests.model.test_ranks_quantized import aligned_source
from tests.model.test_ready import directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a ready decoder, parts for two ranks, and what a builder puts beside them."""
    made = directory(tmp_path, aligned_source("llama"))
    parts.make(made, 1, "int8-block")
    parts.make(made, 2, "none")
    (made / WEIGHTS_DIGEST).write_text(belonging.check(made, [made / "parts"]))
    return made


def exchange_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, model / "model.safetensors")


def test_parts_of_these_weights_are_found_to_be(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = DirectorySource(model).weights_sha256()
    assert belonging.main([f"--model={model}", f"--parts={model / 'parts'}"]) == 0
    assert json.loads(capsys.readouterr().out) == {"weights_sha256": said}


def test_parts_of_other_weights_are_told_by_their_folder(model: Path) -> None:
    exchange_weights(model)
    with pytest.raises(SourceError, match="the parts in `ready-int8-block` were made from other weights"):
        belonging.check(model, [model / "parts"])
    (model / "parts" / "ready-int8-block" / "manifest.json").unlink()
    with pytest.raises(SourceError, match="the parts in `tp2-none` were made from other weights"):
        belonging.check(model, [model / "parts"])


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "[" * 10_000, " " * (1 << 20) + "{}"])
def test_a_part_that_does_not_say_what_it_is_of_is_refused(
    model: Path, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "parts" / "tp2-none" / "manifest.json").write_text(manifest)
    assert belonging.main([f"--model={model}", f"--parts={model / 'parts'}"]) == belonging.EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: a part's manifest ")


def test_a_model_without_weights_has_nothing_to_compare_with(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no weights to hold its parts against"):
        belonging.check(model, [model / "parts"])


def start_of_two(model: Path) -> None:
    plain = RunnerConfig(sequence_tokens=64, running_limit=2, step_tokens=64, kv_mib=4, threads=1)

    def rank(group: Group | None) -> None:
        build_runner(plain, OpenedSource(FakeOpener(model)), lambda phrase: None, group)

    together(2, rank)


def test_a_start_from_a_package_takes_parts_of_the_weights_that_it_names(model: Path) -> None:
    opener = FakeOpener(model)
    assert "made ready" in started(opener)[1].quantized
    assert not set(opener.read) & set(load_file(model / "model.safetensors")), "no weight is opened for it"
    start_of_two(model)


def test_a_start_from_a_package_refuses_parts_of_others(model: Path) -> None:
    (model / WEIGHTS_DIGEST).write_text("0" * 64)
    with pytest.raises(LoadError, match="made from other weights"):
        started(FakeOpener(model))
    with pytest.raises(LoadError, match="another `source_sha256`"):
        start_of_two(model)


def test_a_digest_that_is_none_is_refused(model: Path) -> None:
    (model / WEIGHTS_DIGEST).write_text("0" * 63)
    with pytest.raises(SourceError, match="digest of the weights is malformed"):
        started(FakeOpener(model))


def test_a_package_without_weights_refuses_what_its_parts_are_not_made_for(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "made ready" in started(FakeOpener(model))[1].quantized
    with pytest.raises(SourceError, match="no unquantized weights, and no parts"):
        started(FakeOpener(model), quantize="none")
    assert CONFIG.quantize == "int8-block"
