"""A bundle with a model, made once per file of tests from a tiny image and a key of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infra.airgap import load, save
from infra.release import files, make, openssl
from tests.infra.airgap.bundles import BUNDLE, MODEL, Docker
from tests.infra.tiny_image import TinyImage


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = tmp_path_factory.mktemp("key") / "vendor.pem"
    openssl.make_key(key)
    return key


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, vendor: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "release"
    folder.mkdir()
    TinyImage().save(folder / files.ARCHIVE)
    make.make(folder, vendor, "strongroom:1-cpu", folder.parent)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name, content in MODEL.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, release: Path, vendor: Path, model: Path) -> Path:
    out = tmp_path_factory.mktemp("out")
    report = save.save(release, vendor, model, out)
    assert report["ok"] and [path.name for path in out.iterdir()] == [f"{BUNDLE}.tar"]
    return Path(report["bundle"])


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    return load.unpack(packed, tmp_path_factory.mktemp("unpacked"))


@pytest.fixture
def bundle(unpacked: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(unpacked, tmp_path / BUNDLE, symlinks=True))


@pytest.fixture(scope="module")
def fingerprint(release: Path) -> str:
    return openssl.fingerprint(release / files.PUBLIC_KEY)


@pytest.fixture
def docker(tmp_path: Path, unpacked: Path) -> Docker:
    return Docker(tmp_path, (unpacked / "images" / "IMAGE_ID").read_text().strip())
