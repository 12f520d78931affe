"""How the image is built: the rules of its Dockerfile, what goes in and what is left out."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from infra.image import build, contents, docker, root
from infra.image.build import BaseRefused, Told
from infra.image.checks.configuration import ISOLATED
from infra.image.docker import DockerFailed
from infra.image.wheelhouse import Locked
from tests.infra.tiny_image import EPOCH_S

DOCKERFILE = (build.ROOT / "container" / "Dockerfile").read_text()
LINES = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def test_the_dockerfile_needs_no_registry_and_builds_with_both_builders() -> None:
    assert not re.search(r"^#\s*syntax", DOCKERFILE, re.MULTILINE)
    assert "--mount" not in DOCKERFILE and "--link" not in DOCKERFILE and "<<" not in DOCKERFILE
    assert not any(line.startswith("ADD") for line in LINES)
    assert not re.search(r"apt|curl|wget|https?://", "\n".join(LINES))
    bases = [line.split()[1] for line in LINES if line.startswith("FROM")]
    assert bases == ["${BASE_IMAGE}", "scratch"]
    assert "ARG BASE_IMAGE" in LINES, "a default could not be a digest that every machine has"


def test_wheels_are_installed_by_hash_from_the_folder_and_nothing_else() -> None:
    installs = re.findall(r"RUN \[.*?\]$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    with_pip = [one for one in installs if '"install"' in one]
    assert len(with_pip) == 2
    for one in with_pip:
        for flag in ("--no-index", "--require-hashes", "--no-deps", "--only-binary"):
            assert flag in one
    assert DOCKERFILE.count("--no-index") == 4  # and the two of our own wheel


def test_what_differs_from_commit_to_commit_comes_after_the_wheels() -> None:
    wheels, first_change = DOCKERFILE.index('tools.lock"]'), DOCKERFILE.index("SOURCE_DATE_EPOCH")
    assert wheels < first_change < DOCKERFILE.index("COPY source")


def test_the_last_stage_copies_from_the_first_and_runs_nothing() -> None:
    last = DOCKERFILE[DOCKERFILE.index("FROM scratch") :]
    assert "\nRUN" not in last
    assert re.findall(r"^COPY (\S+)", last, re.MULTILINE) == ["--from=build"] * 3
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", last, re.MULTILINE)
    assert entry is not None
    assert [part for part in ISOLATED if f'"{part}"' in entry[1]] == ISOLATED
    assert "USER 10001:10001" in last and "HEALTHCHECK NONE" in last and "accept-bind-to-port=true" in last


def installed(site: Path, name: str, *paths: str) -> Path:
    """Install a package of these files; return its RECORD."""
    for path in paths:
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text("x" * 10)
    record = site / f"{name}-1.0.dist-info" / "RECORD"
    record.parent.mkdir(parents=True)
    lines = [f"{path},sha256=abc,10" for path in (*paths, "../../../bin/tool")]
    record.write_text("\n".join([*lines, f"{name}-1.0.dist-info/RECORD,,", ""]))
    return record


def test_what_is_left_out_of_a_package_is_left_out_of_its_record(tmp_path: Path) -> None:
    record = installed(tmp_path, "a", "a/x.py", "a/tests/test_x.py", "a/deep/tests/y/z.py", "a/latests.py")
    assert root.prune(tmp_path, {"*/tests/*": "tests"}) == {"*/tests/*": 20}
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == ["latests.py", "x.py"]
    names = [line.split(",")[0] for line in record.read_text().splitlines()]
    assert names == ["a/x.py", "a/latests.py", "../../../bin/tool", "a-1.0.dist-info/RECORD"]


def test_a_pattern_that_leaves_nothing_out_is_stale_and_stops_the_build(tmp_path: Path) -> None:
    installed(tmp_path, "a", "a/x.py")
    with pytest.raises(AssertionError, match="gone"):
        root.prune(tmp_path, {"gone/*": "was there once"})


def test_only_the_interpreter_and_our_verbs_are_commands(tmp_path: Path) -> None:
    folder, site = tmp_path / "bin", tmp_path / "lib" / "python3.11" / "site-packages"
    folder.mkdir()
    (folder / "tool").write_text("")
    (folder / "pip").write_text("")
    record = installed(site, "a", "a/x.py")
    root.commands(folder, site)
    assert sorted(path.name for path in folder.iterdir()) == ["python", "serve", "train"]
    assert "bin/tool" not in record.read_text()
    assert (folder / "serve").read_text().startswith(f"#!{contents.VENV}/bin/python -IB\n")
    assert 'main(["train"])' in (folder / "train").read_text()
    assert os.access(folder / "serve", os.X_OK)


def test_everything_gets_one_time_and_modes_that_let_nobody_write(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "tmp").mkdir(parents=True)
    (tree / "bin").mkdir(mode=0o777)
    for name, mode in (("bin/run", 0o6777), ("bin/data", 0o666)):
        (tree / name).write_text("x")
        (tree / name).chmod(mode)
    (tree / "link").symlink_to("bin/run")
    root.fix(tree, EPOCH_S)
    modes = {
        path.name: stat.S_IMODE(path.lstat().st_mode) for path in tree.rglob("*") if not path.is_symlink()
    }
    assert modes == {"tmp": 0o1777, "bin": 0o755, "run": 0o755, "data": 0o644}
    assert {path.lstat().st_mtime for path in (tree, *tree.rglob("*"))} == {EPOCH_S}


def test_libraries_are_found_by_what_is_linked_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(sys.executable, tmp_path / "program")
    (tmp_path / "text").write_text("no program")
    found = list(root.linked(tmp_path))
    assert any(name.endswith("libc.so.6") for name in found)
    assert all(Path(name).exists() for name in found)
    (tmp_path / "program").unlink()
    assert list(root.linked(tmp_path)) == []


def test_byte_code_is_made_once_and_never_compared_with_its_source(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "template.py").write_text("def {{ name }}(): pass\n")
    root.compile_all(tmp_path, tmp_path)
    (made,) = (tmp_path / "__pycache__").iterdir()
    head = made.read_bytes()[:16]
    assert head[4:8] == b"\x01\0\0\0"  # PEP 552: by hash, unchecked
    first = made.read_bytes()
    os.utime(tmp_path / "good.py", (1, 1))
    root.compile_all(tmp_path, tmp_path)
    assert made.read_bytes() == first


def test_no_list_lets_a_shell_or_an_installer_in() -> None:
    text = Path(contents.__file__).read_text()
    assert "/bin/sh" not in text and "busybox" not in text
    assert {"test", "ensurepip", "venv", "sitecustomize.py"} <= set(contents.STDLIB_LEFT_OUT)
    assert "infra/*" in contents.ROOMS_LEFT_OUT
    assert contents.PASSWD.count("/nonexistent\n") == contents.PASSWD.count("\n")


def test_a_base_that_can_change_is_refused(tmp_path: Path) -> None:
    for name in ("debian", "debian:latest", "debian:bookworm"):
        with pytest.raises(BaseRefused) as caught:
            build.base_image(Told("cpu", name, "x", tmp_path, clean=False), EPOCH_S)
        assert "@sha256:" in caught.value.hint
    pinned = "debian@sha256:" + "a" * 64
    assert build.base_image(Told("cpu", pinned, "x", tmp_path, clean=False), EPOCH_S) == (pinned, pinned[7:])


def test_docker_is_given_tracked_sources_wheels_and_locks(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").write_text("wheel")
    line = Locked("a", "1", frozenset({"1" * 64}))
    context = tmp_path / "context"
    build.lay_out(context, wheels, [line], [line])
    assert {path.name for path in context.iterdir()} == {
        *("Dockerfile", "wheelhouse", "requirements.lock", "tools.lock", "source")
    }
    given = {
        str(path.relative_to(context / "source"))
        for path in (context / "source").rglob("*")
        if path.is_file()
    }
    assert {"pyproject.toml", "container/kernels/build_hook.py", "sagemaker_entry/__main__.py"} <= given
    assert not [
        name for name in given if name.startswith(("tests/", "scripts/", ".")) or name.endswith(".so")
    ]
    assert (context / "requirements.lock").read_text() == f"a==1 --hash=sha256:{'1' * 64}\n"


def test_what_docker_says_of_a_failure_reaches_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "docker"
    program.write_text("#!/bin/sh\necho step 3 went wrong\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("DOCKER", str(program))
    assert not docker.available()
    with pytest.raises(DockerFailed, match="`docker build` failed: step 3 went wrong"):
        docker.docker("build", ".")
    monkeypatch.setenv("DOCKER", str(tmp_path / "none"))
    with pytest.raises(DockerFailed) as caught:
        docker.docker("info")
    assert "set DOCKER" in caught.value.hint
    assert build.main(["--base", "debian:latest"]) == 3
    assert capsys.readouterr().err.startswith("error: `debian:latest` can change its contents\nhint: ")


def test_with_a_daemon_that_answers_the_command_runs_and_its_status_is_passed_on(tmp_path: Path) -> None:
    answers = tmp_path / "docker"
    answers.write_text("#!/bin/sh\nexit 0\n")
    answers.chmod(0o755)
    script = build.ROOT / "scripts" / "with-docker"
    done = subprocess.run(
        [script, "sh", "-c", "echo ran; exit 5"],
        env={"DOCKER": str(answers), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "ran\n")


@pytest.mark.parametrize("name", ["build-image", "check-image"])
def test_the_scripts_hold_no_logic_and_say_what_they_take(name: str) -> None:
    text = (build.ROOT / "scripts" / name).read_text()
    assert len(text.splitlines()) <= 7
    module = re.search(r"-m (\S+) ", text)
    assert module is not None
    said = subprocess.run(
        [sys.executable, "-m", module[1], "--help"],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"scripts/{name}" in said.stdout
