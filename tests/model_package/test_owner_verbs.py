"""What a package's owner does with it: wrap for others, write back plain, compare."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from model_package import comparing, recipients, rewrapping, sealer, unsealing
from model_package.manifest import Manifest
from model_package.opener import open_package
from model_package.outcome import Outcome, PackageError
from model_package.sealing import SealError
from tests.model_package import making

ROOMS = Path(__file__).resolve().parents[2]


def public(name: str) -> bytes:
    return recipients.hpke.public_of(making.key(name))


def rewrapped(
    source: Path, destination: Path, *names: str, key: str = "data", epoch: int | None = None
) -> Manifest:
    wrap = sealer.to_public_keys([public(name) for name in names])
    with open_package(source, making.trust()) as package:
        return rewrapping.rewrap(
            source, package, destination, making.key(key), wrap, making.key("vendor"), epoch
        )


def unwraps(made: Manifest, name: str) -> bool:
    try:
        return recipients.unwrap(made.recipients, making.key(name), made.key_context) == making.key("data")
    except PackageError as error:
        assert error.outcome is Outcome.RECIPIENT_MISSING
        return False


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    making.seal(making.model(tmp_path / "plain"), tmp_path / "sealed", recipients=[public("old")])
    return tmp_path / "sealed"


def test_wrapping_for_another_shuts_out_the_old_and_changes_no_sealed_byte(
    sealed: Path, tmp_path: Path
) -> None:
    made = rewrapped(sealed, tmp_path / "new", "new", epoch=6)
    assert unwraps(made, "new") and not unwraps(made, "old")
    before = open_package(sealed, making.trust()).manifest
    assert unwraps(before, "old")
    assert (made.as_base, made.files, made.epoch) == (before.as_base, before.files, 6)
    for entry in made.files:
        assert os.path.samefile(sealed / entry.stored_name, tmp_path / "new" / entry.stored_name)
    with making.opened(tmp_path / "new") as contents:
        assert making.read_all(contents) == making.plain(tmp_path / "plain")
    with pytest.raises(PackageError) as caught:  # and whoever requires the new epoch refuses the old package
        open_package(sealed, making.trust(min_epoch=6))
    assert caught.value.outcome is Outcome.EPOCH_TOO_OLD


def test_files_are_copied_where_they_cannot_be_linked(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(rewrapping.os, "link", refuse)
    rewrapped(sealed, tmp_path / "new", "new")
    with making.opened(tmp_path / "new") as contents:
        assert making.read_all(contents) == making.plain(tmp_path / "plain")


def test_a_wrong_key_an_older_epoch_and_a_used_directory_are_refused(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError) as caught:
        rewrapped(sealed, tmp_path / "new", "new", key="another")
    assert caught.value.outcome is Outcome.KEY_WRONG
    with pytest.raises(SealError, match="never lowered"):
        rewrapped(sealed, tmp_path / "new", "new", epoch=4)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SealError, match="holds a package already"):
        rewrapped(sealed, sealed, "new")
    with pytest.raises(SealError, match="not empty"):
        rewrapped(sealed, tmp_path / "plain", "new")


def test_the_data_key_is_wiped_after_wrapping(sealed: Path, tmp_path: Path) -> None:
    for name in ("data", "another"):
        data_key = making.key(name)
        with open_package(sealed, making.trust()) as package:
            try:
                rewrapping.rewrap(
                    sealed, package, tmp_path / name, data_key, lambda _c, _k: [], making.key("vendor")
                )
            except PackageError as error:
                assert error.outcome is Outcome.KEY_WRONG
        assert data_key == bytearray(32)


def test_unsealing_writes_back_what_was_sealed_for_its_owner_alone(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    (source / "parts").mkdir()
    (source / "parts" / "empty.safetensors").write_bytes(making.safetensors([]))
    making.seal(source, tmp_path / "sealed")
    told: list[int] = []
    with making.opened(tmp_path / "sealed") as contents:
        written = unsealing.unseal(contents, tmp_path / "back", told.append)
        with pytest.raises(SealError, match="not empty"):
            unsealing.unseal(contents, tmp_path / "back")
    assert making.plain(tmp_path / "back") == making.plain(source)
    assert written == sum(len(content) for content in making.plain(source).values())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o700


def test_unsealing_a_damaged_package_leaves_no_file_of_the_damaged_one(sealed: Path, tmp_path: Path) -> None:
    made = open_package(sealed, making.trust()).manifest
    (entry,) = [entry for entry in made.files if entry.name == "model.safetensors"]
    raw = bytearray((sealed / entry.stored_name).read_bytes())
    raw[-20] ^= 1
    (sealed / entry.stored_name).write_bytes(raw)
    with making.opened(sealed) as contents, pytest.raises(PackageError):
        unsealing.unseal(contents, tmp_path / "back")
    assert not list((tmp_path / "back").glob("model.safetensors*"))


def test_nothing_that_serves_can_write_plain_bytes() -> None:
    """Only the owner's command line imports what does."""
    importers = set()
    for path in [*ROOMS.glob("*/**/*.py")]:
        room = path.relative_to(ROOMS).parts[0]
        if room not in {"container", "sagemaker_entry", "model_package", "infra"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.endswith("unsealing") or any(name.endswith("unsealing") for name in names):
                importers.add(room)
    assert importers <= {"infra"}


def test_two_packages_differ_in_what_was_changed_and_nothing_else(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    first = making.seal(source, tmp_path / "first")
    same = making.seal(source, tmp_path / "same")
    tensors = making.tensors()
    name, dtype, shape, data = tensors[2]
    tensors[2] = (name, dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    (source / "model.safetensors").write_bytes(making.safetensors([*tensors, ("more", "U8", (1,), b"x")]))
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").rename(source / "settings.json")
    other = making.seal(source, tmp_path / "other", epoch=6)
    with (
        making.opened(tmp_path / "first") as one,
        making.opened(tmp_path / "same") as two,
        making.opened(tmp_path / "other") as three,
    ):
        assert comparing.difference(first, same, (one, two)).same_content
        found = comparing.difference(first, other, (one, three))
        counts = comparing.tensor_counts(one)
    assert not found.same_content
    assert {"epoch", "package_id", "content_sha256"} <= set(found.fields)
    assert (found.only_first, found.only_second) == (("config.json",), ("settings.json",))
    assert found.files == (
        comparing.FileDifference("model.safetensors", same=4, changed=1, only_first=0, only_second=1),
        comparing.FileDifference("tokenizer.json", same=0, changed=1, only_first=0, only_second=0),
    )
    assert counts == {"model.safetensors": {"BF16": 1, "F16": 1, "F32": 2, "U8": 1}}
    assert comparing.difference(first, same).files is None  # without keys nobody can tell
    assert "model.embed.weight" not in repr(found) + json.dumps(counts)
