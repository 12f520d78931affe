"""Two commits beside each other: their rooms, our harness, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import compare
from tests.bench.environments import SetupFailed
from tests.bench.serve import Plan
from tests.bench.tiny_model import write_checkpoint


def silent(_: str) -> None:
    """Tell nobody."""


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    run = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits with another room each; the harness in the checkout is newer than both."""
    root = tmp_path / "repository"
    (root / "tests" / "bench").mkdir(parents=True)
    (root / compare.LOCK).write_text("torch==1\n")
    git(tmp_path, "init", "-q", "repository")
    for number in (1, 2):
        (root / "room.py").write_text(f"VALUE = {number}\n")
        (root / "tests" / "bench" / "old.py").write_text(f"OLD = {number}\n")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", f"commit {number}")
    (root / "tests" / "bench" / "old.py").unlink()
    (root / "tests" / "bench" / "new.py").write_text("NEW = 3\n")
    monkeypatch.setattr(compare, "ROOT", root)
    return root


def test_a_checkout_has_the_commits_rooms_and_this_checkouts_harness(
    repository: Path, tmp_path: Path
) -> None:
    with compare.checkout("HEAD~1", tmp_path / "a") as where:
        assert (where / "room.py").read_text() == "VALUE = 1\n"
        assert [path.name for path in (where / "tests" / "bench").iterdir()] == ["new.py"]
    assert not where.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_checkout_is_removed_when_measuring_fails(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broke"), compare.checkout("HEAD", tmp_path / "a"):
        raise RuntimeError("it broke")
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_an_unknown_commit_is_refused_by_git(repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(SetupFailed, match="`git worktree` failed"),
        compare.checkout("nowhere", tmp_path / "a"),
    ):
        raise AssertionError("there is no such commit")


def test_this_environment_serves_both_while_the_locks_agree(repository: Path, tmp_path: Path) -> None:
    with compare.checkout("HEAD~1", tmp_path / "a") as where:
        assert compare.python_of(where, silent) == Path(sys.executable)


def test_another_lock_gets_an_environment_of_its_own(repository: Path, tmp_path: Path) -> None:
    with compare.checkout("HEAD", tmp_path / "a") as where:
        (where / compare.LOCK).write_text("torch==2\n")
        script = where / "scripts" / "environment"
        script.parent.mkdir()
        script.write_text("#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
        assert compare.python_of(where, silent) == where / ".venv" / "bin" / "python"
        script.write_text("#!/bin/sh\nexit 3\n")
        with pytest.raises(SetupFailed, match="scripts/environment"):
            compare.python_of(where, silent)


def test_each_side_imports_its_own_build_before_anything_else(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "build", lambda where, python: where.with_name("built"))
    plan = Plan(write_checkpoint(tmp_path / "tiny"), ("none", "int8-block"), ("W1",), 3, False, tmp_path)
    with compare.checkout("HEAD", tmp_path / "a") as where:
        sides = compare.contestants(plan, "A", where, silent)
        assert [one.name for one in sides] == ["A none", "A int8-block"]
        assert {one.environment["PYTHONPATH"] for one in sides} == {f"{where.with_name('built')}:{where}"}
        assert {one.root for one in sides} == {where}
