"""The demo's package: sealed under keys of its own, readable with them alone, gone afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_package import key_files, opener, public_keys
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from model_package.signature import Root, Roots
from scripts.demo_package import Sealed, ensure_ready, sealed
from tests.model_package import making
from tests.sagemaker_entry.sealed_model import plain_model


def heard(_stage: str, share: float) -> None:
    assert 0.0 <= share <= 1.0


def opened(package: Sealed) -> opener.Package:
    text = package.environment["STRONGROOM_VENDOR_ROOTS"]
    roots = Roots(vendor=(Root(public_keys.parse(text).raw),))
    return opener.open_package(package.path, opener.Trust(Owner.VENDOR, roots, 2**33))


def test_a_package_opens_with_what_its_endpoint_is_told_and_is_gone_afterwards(tmp_path: Path) -> None:
    model = making.model(tmp_path / "model")
    with sealed(model, "tiny", heard) as first, sealed(model, "tiny", heard) as second:
        key_path = Path(first.environment["STRONGROOM_KEY"].removeprefix("file:"))
        assert key_path.stat().st_mode & 0o077 == 0 and first.sealed_bytes > 10_000
        with opened(first) as package, package.unlock(key_files.read_file(key_path)) as contents:
            assert making.read_all(contents) == making.plain(model)
        with opened(second) as package, pytest.raises(PackageError) as caught:
            package.unlock(key_files.read_file(key_path))
        assert caught.value.outcome is Outcome.KEY_WRONG
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_is_made_ready_once_and_its_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    made = plain_model(tmp_path / "made")
    checkpoint.mkdir()
    for path in made.iterdir():
        if path.is_file():
            (checkpoint / path.name).write_bytes(path.read_bytes())
    before = making.plain(checkpoint)
    ready = ensure_ready(checkpoint, heard)
    assert (ready / "parts" / "ready-int8-block" / "decoder.safetensors").is_file()
    stamp = (ready / "parts" / "ready-int8-block" / "manifest.json").stat().st_mtime_ns
    assert ensure_ready(checkpoint, heard) == ready
    assert (ready / "parts" / "ready-int8-block" / "manifest.json").stat().st_mtime_ns == stamp
    assert making.plain(checkpoint) == before
    assert {path.name for path in tmp_path.iterdir()} == {"made", "checkpoint", ready.name}
