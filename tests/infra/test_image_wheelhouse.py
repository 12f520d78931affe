"""Wheels come from a lock, and nothing that no lock names is installed."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from infra.image import wheelhouse
from infra.image.wheelhouse import BUILD_TOOLS, Locked, WheelRefused, build_tools, complete, fill, read_lock

ROOT = Path(__file__).parents[2]


def locked(name: str, content: bytes) -> Locked:
    return Locked(name, "1.0", frozenset({hashlib.sha256(content).hexdigest()}))


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What pip would fetch: file name -> contents; an empty index refuses."""
    offered: dict[str, bytes] = {}

    def fetch(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        assert "--require-hashes" in command and "--no-deps" in command
        for name, content in offered.items():
            (folder / name).write_bytes(content)
        said = "" if offered else "looking\nERROR: no such version"
        return subprocess.CompletedProcess(command, 0 if offered else 1, "", said)

    monkeypatch.setattr(wheelhouse.subprocess, "run", fetch)
    return offered


def test_what_is_missing_is_fetched_and_verified(tmp_path: Path, index: dict[str, bytes]) -> None:
    index["a.whl"] = b"a"
    fill(tmp_path / "w", [locked("a", b"a")])
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["a.whl"]
    assert not (tmp_path / "w.lock").exists()


def test_a_full_folder_needs_no_index(tmp_path: Path, index: dict[str, bytes]) -> None:
    (tmp_path / "a.whl").write_bytes(b"a")
    fill(tmp_path, [locked("a", b"a")])  # the index offers nothing: asking it would be refused
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


def test_a_file_that_no_lock_names_does_not_stay(tmp_path: Path, index: dict[str, bytes]) -> None:
    (tmp_path / "a.whl").write_bytes(b"a")
    (tmp_path / "evil.whl").write_bytes(b"evil")
    fill(tmp_path, [locked("a", b"a")])
    assert not (tmp_path / "evil.whl").exists()


def test_a_wheel_that_is_not_the_locked_one_is_refused(tmp_path: Path, index: dict[str, bytes]) -> None:
    index["a.whl"] = b"another"
    with pytest.raises(WheelRefused, match="not the locked one"):
        fill(tmp_path, [locked("a", b"a")])
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_lacks_one_is_named_in_one_line(tmp_path: Path, index: dict[str, bytes]) -> None:
    with pytest.raises(WheelRefused, match="ERROR: no such version") as caught:
        fill(tmp_path, [locked("a", b"a")])
    assert caught.value.hint


def test_a_folder_is_complete_when_every_line_has_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"a")
    assert complete(tmp_path, [locked("a", b"a")])
    assert not complete(tmp_path, [locked("a", b"a"), locked("b", b"b")])


def test_a_lock_s_lines_are_read_with_all_their_hashes() -> None:
    one, two = "1" * 64, "2" * 64
    text = f"Foo_Bar==1.2+cpu \\\n    --hash=sha256:{one} \\\n    --hash=sha256:{two}\n"
    text += f"# why\nb==2 --hash=sha256:{one}\n"
    found = read_lock(text)
    assert [(each.name, each.version, len(each.hashes)) for each in found] == [
        ("foo-bar", "1.2+cpu", 2),
        ("b", "2", 1),
    ]
    assert read_lock(found[0].text) == [found[0]]


@pytest.mark.parametrize("line", ["flask", "flask>=3", "flask==3.1", "-r other.txt", "--extra-index-url x"])
def test_a_line_that_pins_nothing_is_refused(line: str) -> None:
    with pytest.raises(WheelRefused, match="pins no version and hash"):
        read_lock(line + "\n")


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_project_s_own_locks_can_be_read_and_hold_what_builds_the_wheel(variant: str) -> None:
    serve = read_lock((ROOT / "container" / f"requirements-{variant}.lock").read_text())
    assert {"torch", "flask", "gunicorn", "gevent"} <= {one.name for one in serve}
    assert not {one.name for one in serve} & {"boto3", "pytest", "gguf", "cryptography"} - {"cryptography"}
    checkout = read_lock((ROOT / "tests" / f"requirements-{variant}.lock").read_text())
    assert {one.name for one in build_tools(checkout)} == set(BUILD_TOOLS)
    with pytest.raises(WheelRefused, match="hatchling"):
        build_tools([one for one in checkout if one.name != "hatchling"])
