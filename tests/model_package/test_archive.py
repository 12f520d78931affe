"""A package as one archive: what goes in, what comes out, twice the same bytes."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from model_package import archive
from model_package.opener import open_package
from model_package.outcome import Outcome, PackageError
from model_package.sealing import SealError
from tests.model_package import making


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    making.seal(making.model(tmp_path / "plain"), tmp_path / "sealed")
    return tmp_path / "sealed"


def pack(sealed: Path, out: Path) -> int:
    with open_package(sealed, making.trust()) as package:
        return archive.write(sealed, package.manifest, out)


def test_an_archive_unpacks_to_a_package_that_opens(sealed: Path, tmp_path: Path) -> None:
    (sealed / "notes.txt").write_text("not part of the package")
    size = pack(sealed, tmp_path / "model.tar.gz")
    assert size == (tmp_path / "model.tar.gz").stat().st_size
    with tarfile.open(tmp_path / "model.tar.gz") as packed:
        members = packed.getmembers()
        packed.extractall(tmp_path / "unpacked", filter="data")
    names = [member.name for member in members]
    assert names[-2:] == ["manifest.sig", "manifest.json"] and "notes.txt" not in names
    assert all("/" not in name for name in names)
    assert {(member.mode, member.uid, member.mtime, member.uname) for member in members} == {
        (0o644, 0, 0, "")
    }
    with making.opened(tmp_path / "unpacked") as contents:
        assert making.read_all(contents) == making.plain(tmp_path / "plain")


def test_the_same_package_gives_the_same_archive(sealed: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(sealed, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_archive_costs_little_beside_what_it_holds(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    (source / "model.safetensors").write_bytes(making.safetensors([("a", "U8", (1 << 22,), bytes(1 << 22))]))
    made = making.seal(source, tmp_path / "sealed")
    size = pack(tmp_path / "sealed", tmp_path / "model.tar.gz")
    assert size < 1.01 * sum(entry.size for entry in made.files)


def test_nothing_is_written_over_and_nothing_half_done_stays(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(SealError, match="exists already"):
        pack(sealed, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with open_package(sealed, making.trust()) as package:
        (sealed / package.manifest.files[-1].stored_name).unlink()
        with pytest.raises(PackageError) as caught:
            archive.write(sealed, package.manifest, tmp_path / "model.tar.gz")
    assert caught.value.outcome is Outcome.FILE_MISSING
    assert not list(tmp_path.glob("model.tar.gz*"))
