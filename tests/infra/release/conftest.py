"""A key and a release of a tiny image, made once per file of tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infra.release import openssl
from tests.infra.release.releases import release_in


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "vendor.pem"
    openssl.make_key(path)
    return path


@pytest.fixture(scope="module")
def vendor(key: Path) -> Path:
    """The vendor's public key, as a customer has it from another source."""
    path = key.with_name("vendor.pub")
    path.write_bytes(openssl.public_key(key))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "release"
    release_in(folder, key)
    return folder


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "release"))
