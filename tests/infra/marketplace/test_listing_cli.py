"""`strongroom listing` as a vendor types it, with a package that the command line sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.marketplace import vendor
from infra.report import ExitCode
from tests.infra.marketplace import making
from tests.infra.test_keys import Shell
from tests.infra.test_packages import Desk


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Desk:
    made = Desk(tmp_path, Shell(monkeypatch, capfd))
    assert made.build("sealed").code == 0
    return made


def build(desk: Desk, server: str, *options: object, **changed: str) -> Any:
    given = {
        "vendor": str(making.EXAMPLE),
        "speed": str(making.SPEED),
        "root": desk.public["vendor"],
    } | changed
    return desk.shell(
        "listing", "build", "--package", desk.folder / "sealed", "--server", server,
        "--out", desk.folder / "listing", *(f"--{name}={value}" for name, value in given.items()), *options,
    )  # fmt: skip


def test_a_listing_is_built_from_a_sealed_package_and_checked_again(desk: Desk) -> None:
    with making.server() as running:
        done = build(desk, running.address, "--quality", f"int8-block={making.QUALITY}", "--json")
    assert done.code == 0, done.stdout + done.stderr
    notes = (desk.folder / "listing" / "version_notes.md").read_text(encoding="utf-8")
    assert "Sealed package tiny 1.0," in notes
    again = desk.shell("listing", "check", desk.folder / "listing", "--json")
    assert again.code == 0 and again.result["regions"] == ["us-east-1"]
    people = desk.shell("listing", "check", desk.folder / "listing")
    assert "the folder passes" in people.stdout and "WARN" in people.stdout
    (desk.folder / "listing" / "usage.md").write_text("x", encoding="utf-8")
    people = desk.shell("listing", "check", desk.folder / "listing")
    assert people.code == ExitCode.CHECK_FAILED and "FAIL  usage.md" in people.stdout


def test_a_package_of_another_signer_is_not_listed(desk: Desk) -> None:
    with making.server() as running:
        done = build(desk, running.address, "--json", root=desk.public["customer"])
    assert done.code != 0 and not (desk.folder / "listing").exists()


def test_what_is_missing_is_one_line_with_its_hint(desk: Desk) -> None:
    done = build(desk, "127.0.0.1:9", speed=str(making.QUALITY))
    assert done.code == ExitCode.USAGE
    assert done.stderr.splitlines()[0].startswith("error: `quality.json` is no measurement")
    assert done.stderr.splitlines()[1].startswith("hint: ")
    with making.server() as running:
        done = build(desk, running.address, "--quality", "int8-block", "--json")
    assert "is not VARIANT=FILE" in done.result["message"]


def test_the_example_that_is_printed_is_one_that_can_be_read(desk: Desk, tmp_path: Path) -> None:
    done = desk.shell("listing", "example")
    (tmp_path / "mine.toml").write_text(done.stdout, encoding="utf-8")
    assert vendor.read(tmp_path / "mine.toml")[0] == making.words()
