"""Saving: the same bytes each time, nothing left out, nothing packed that does not verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infra.airgap import load, save
from infra.release import files, openssl
from infra.release.files import ReleaseRefused
from tests.infra.airgap.bundles import MODEL
from tests.infra.tiny_image import EPOCH_S


def test_two_bundles_of_one_release_are_the_same_bytes(
    packed: Path, tmp_path: Path, release: Path, vendor: Path, model: Path
) -> None:
    again = Path(save.save(release, vendor, model, tmp_path)["bundle"])
    assert files.digest(again) == files.digest(packed)


def test_the_manifest_names_every_file_and_what_a_machine_needs(unpacked: Path) -> None:
    manifest = json.loads((unpacked / "MANIFEST.json").read_text())
    named = {entry["path"] for entry in manifest["files"]}
    assert named == set(save.paths(unpacked)) - {"MANIFEST.json", save.SUMS, save.SIGNATURE}
    for entry in manifest["files"]:
        assert files.digest(unpacked / entry["path"]) == entry["sha256"]
    assert manifest["created"] == EPOCH_S and manifest["min_docker"] == "20.10"
    assert manifest["model"]["files"] == len(MODEL)
    assert {"SETTINGS.md", "ERRORS.md", "INSTALL.md", "KEYS.md"} <= {
        p.name for p in (unpacked / "docs").iterdir()
    }
    assert len(list((unpacked / "templates").glob("*.template.yaml"))) >= 20


def test_a_bundle_without_a_model_has_a_place_for_it(tmp_path: Path, release: Path, vendor: Path) -> None:
    folder = load.unpack(Path(save.save(release, vendor, None, tmp_path)["bundle"]), tmp_path / "to")
    assert [path.name for path in (folder / "model").iterdir()] == ["README"]


def test_a_release_of_another_key_or_one_that_does_not_verify_is_not_packed(
    tmp_path: Path, release: Path, vendor: Path
) -> None:
    other = tmp_path / "other.pem"
    openssl.make_key(other)
    with pytest.raises(ReleaseRefused, match="signed by another key"):
        save.save(release, other, None, tmp_path / "out")
    spoilt = Path(shutil.copytree(release, tmp_path / "release"))
    (spoilt / files.SPDX).write_text("{}")
    with pytest.raises(ReleaseRefused, match="is not what was signed"):
        save.save(spoilt, vendor, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_file_whose_name_a_shell_could_misread_does_not_travel(
    tmp_path: Path, release: Path, vendor: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a b").write_text("x")
    with pytest.raises(ReleaseRefused, match="cannot travel"):
        save.save(release, vendor, tmp_path / "model", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
