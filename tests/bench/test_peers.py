"""Setting peers up: what fails is named and done again, what is done is not done twice."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench import peers
from tests.bench.environments import Place, Ready, SetupFailed, key_of


def silent(_: str) -> None:
    """Tell nobody."""


def test_a_peer_that_cannot_be_had_is_named_with_the_reason_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, ...]] = []

    def had(model: Path, *arguments: str) -> Ready:
        given.append((model, *arguments))
        return Ready(Path(sys.executable), tmp_path / "weights", {"precision": "int8"}, {"A": "b"}, "notes")

    def refused(model: Path, *_: str) -> Ready:
        raise SetupFailed("no compiler")

    monkeypatch.setattr(importlib.import_module("tests.bench.drivers.openvino"), "set_up", had)
    monkeypatch.setattr(importlib.import_module("tests.bench.drivers.llama_cpp"), "set_up", refused)
    found, failures = peers.prepare(["llama.cpp-q8_0", "openvino-int8"], tmp_path, silent)
    assert failures == {"llama.cpp-q8_0": "no compiler"}
    assert [(one.name, one.module, one.notes) for one in found] == [("openvino-int8", "openvino", "notes")]
    assert given == [(tmp_path, "int8")]
    assert found[0].environment == {"A": "b"} and found[0].model == tmp_path / "weights"


@pytest.mark.parametrize("name", sorted({peer.module for peer in peers.PEERS.values()}))
def test_every_peer_is_one_file_that_needs_nothing_of_its_library_to_be_set_up(name: str) -> None:
    module: ModuleType = importlib.import_module(f"tests.bench.drivers.{name}")
    assert callable(module.set_up) and module.NEED_MIB > 0
    foreign = {"openvino_genai", "vllm", "openvino", "llama_cpp"}
    top = {line.split()[1].split(".")[0] for line in inspect.getsource(module).splitlines() if _imports(line)}
    assert not top & foreign


def _imports(line: str) -> bool:
    return line.startswith(("import ", "from "))


def test_all_usual_peers_exist() -> None:
    assert set(peers.USUAL) <= set(peers.PEERS)


def test_a_step_that_failed_is_done_again_and_one_that_worked_is_not(tmp_path: Path) -> None:
    place = Place("peer", tmp_path)
    done: list[int] = []

    def work() -> None:
        done.append(len(done))
        if len(done) < 2:
            raise SetupFailed("not yet")

    with pytest.raises(SetupFailed):
        place.once("step", work)
    place.once("step", work)
    place.once("step", work)
    assert done == [0, 1]


def test_a_command_that_fails_is_named_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    place = Place("peer", tmp_path)
    with pytest.raises(SetupFailed, match=r"`.* -c .*` failed \(CalledProcessError\); see"):
        place.run(sys.executable, "-c", "print('no such thing'); raise SystemExit(3)")
    assert "no such thing" in place.log.read_text()
    with pytest.raises(SetupFailed, match="FileNotFoundError"):
        place.run(tmp_path / "absent-tool")
    place.run(sys.executable, "-c", "import os; assert os.environ['SEEN'] == '1'", environment={"SEEN": "1"})


def test_the_cache_moves_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_BENCH_CACHE", str(tmp_path / "elsewhere"))
    assert Place("peer").folder == tmp_path / "elsewhere" / "peer"


def test_checkpoints_of_one_name_in_two_places_do_not_share_a_conversion(tmp_path: Path) -> None:
    assert key_of(tmp_path / "a" / "model") != key_of(tmp_path / "b" / "model")
    assert key_of(tmp_path / "a" / "model") == key_of(tmp_path / "a" / "model")
