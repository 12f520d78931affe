"""`strongroom package quality` and `shard`: the child processes they run and how their end is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from infra import packaging
from infra.report import CommandError, ExitCode

ROW = {
    "variant": "int8-block",
    "quality": {"kl_mean": 0.004, "kl_p99": 0.02, "top1_agreement": 0.97},
    "weight_bytes": 1 << 20,
    "decode_speedup": {"1": 2.0, "8": 1.2},
    "refused": None,
}


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the interpreter; the test writes what it does."""
    program = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(program))
    return program


def says(program: Path, *lines: str) -> None:
    program.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    program.chmod(0o755)


def call(**given: object) -> dict[str, object]:
    settings: dict[str, object] = {"variants": None, "text": None, "tokens": 64, "threads": None}
    return packaging.quality(Path("m"), Path("o"), **{**settings, **given})  # type: ignore[arg-type]


def test_options_reach_the_child_and_no_aws_variable_does(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    says(
        child,
        f'echo "$@" > {tmp_path}/given',
        f"env > {tmp_path}/environment",
        'echo \'{"rows": [], "files": []}\'',
    )
    assert call(variants="fp8", threads=2) == {"rows": [], "files": []}
    assert (tmp_path / "given").read_text().split() == [
        *("-m", "container.model.quality", "--model=m", "--out=o", "--variants=fp8"),
        *("--tokens=64", "--threads=2"),
    ]
    assert "AWS_" not in (tmp_path / "environment").read_text()


@pytest.mark.parametrize(("status", "code"), [(2, ExitCode.USAGE), (1, ExitCode.CHECK_FAILED)])
def test_a_child_that_fails_fails_the_verb(child: Path, status: int, code: ExitCode) -> None:
    says(child, f"exit {status}")
    with pytest.raises(CommandError) as raised:
        call()
    assert raised.value.code == code


def test_rows_are_shown_with_those_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {**ROW, "variant": "fp8", "quality": None, "refused": "no such hardware"}
    packaging.show(json.loads(json.dumps({"rows": [ROW, refused], "files": ["quality.json"]})))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["int8-block", "1", "0.00400", "0.0200", "0.970", "2.00x"]
    assert lines[2] == "fp8          not measured: no such hardware" and lines[3] == "quality.json"


def test_parts_are_made_by_a_child_and_shown_with_their_sizes(
    child: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"folder": "m/parts/tp2-none", "quantization": "none", "part_bytes": [3 << 20, 1 << 20]}
    says(child, f'echo "$@" > {tmp_path}/given', f"echo '{json.dumps(answer)}'")
    packaging.show_parts(packaging.shard(Path("m"), 2, "none"))
    assert (tmp_path / "given").read_text().split() == [
        *("-m", "container.model.parts", "--model=m", "--tensor-parallel=2", "--quantize=none")
    ]
    assert capsys.readouterr().out == "m/parts/tp2-none: 2 parts of 3.0, 1.0 MiB, none\n"
