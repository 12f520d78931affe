"""`strongroom key unlock`: the client's end, against a container's end in this process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from infra import unlocking
from infra.report import CommandError, ExitCode
from model_package import secret, unlock
from model_package.manifest import Base
from model_package.recipients import Owner
from tests.model_package.parties import NOW_S, Party, customer, fresh_key, vendor

BASE = Base(content_sha256="ab" * 32, package_id="cd" * 16)


class Scene:
    """A customer's sealed adapter, its key file, and a container of its base."""

    def __init__(self, folder: Path, owner: Party, base: Base | None) -> None:
        self.folder, self.owner = folder, owner
        self.data_key = fresh_key()
        self.manifest = owner.seal(folder / "package", self.data_key, base=base)
        self.container = unlock.Container(base or self.manifest.as_base, "1.0")
        (folder / "description").write_bytes(self.container.describe())
        (folder / "key").write_bytes(self.data_key)
        (folder / "key").chmod(0o400)

    def seal(self, **changed: str) -> dict[str, object]:
        given = {
            "owner": self.owner.owner.value,
            "root": f"ed25519:{self.owner.root.public_key.hex()}",
            "key": f"file:{self.folder}/key",
            "image": "1.0",
            "description": "description",
            **changed,
        }
        return unlocking.seal(
            self.folder / given["description"],
            self.folder / "package",
            given["owner"],
            given["root"],
            given["key"],
            ["0.9", given["image"]],
            self.folder / "message",
        )

    def refused(self, **changed: str) -> CommandError:
        with pytest.raises(CommandError) as raised:
            self.seal(**changed)
        assert not (self.folder / "message").exists()
        return raised.value


@pytest.fixture(autouse=True)
def dumpable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process must stay dumpable for other tests; the clock is that of the packages."""
    monkeypatch.setattr(secret, "harden_process", lambda: None)
    monkeypatch.setattr(time, "time", lambda: float(NOW_S))


@pytest.fixture
def adapter(tmp_path: Path) -> Scene:
    return Scene(tmp_path, customer(), BASE)


def test_the_message_unlocks_the_container_and_no_second_time(
    adapter: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    result = adapter.seal()
    message = (adapter.folder / "message").read_bytes()
    assert (adapter.folder / "message").stat().st_mode & 0o7777 == 0o600
    assert adapter.container.open_message(message, adapter.manifest) == adapter.data_key
    unlocking.show(result)
    assert adapter.manifest.package_id in capsys.readouterr().out
    with pytest.raises(CommandError) as raised:
        adapter.seal()
    assert raised.value.kind == "key_file_exists"


def test_a_bases_key_reaches_the_container_that_waits_for_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path, vendor(), None)
    scene.seal()
    message = (tmp_path / "message").read_bytes()
    assert scene.container.open_message(message, scene.manifest) == scene.data_key


def test_an_unexpected_container_gets_no_key(adapter: Scene) -> None:
    assert adapter.refused(image="1.1").kind == "container_unexpected"
    other = unlock.Container(Base(content_sha256="00" * 32, package_id="cd" * 16), "1.0")
    (adapter.folder / "other").write_bytes(other.describe())
    assert adapter.refused(description="other").kind == "base_wrong"


def test_another_root_key_or_owner_is_refused(adapter: Scene) -> None:
    assert adapter.refused(root=f"ed25519:{customer().root.public_key.hex()}").kind == "signer_unknown"
    (adapter.folder / "other").write_bytes(fresh_key())
    (adapter.folder / "other").chmod(0o400)
    assert adapter.refused(key=f"file:{adapter.folder}/other").kind == "key_wrong"
    assert adapter.refused(owner=Owner.VENDOR.value).kind == "owner_wrong"


def test_a_missing_long_or_malformed_description_is_refused(adapter: Scene) -> None:
    missing = adapter.refused(description="missing")
    assert (missing.kind, missing.code) == ("bad_argument", ExitCode.USAGE)
    (adapter.folder / "long").write_bytes((adapter.folder / "description").read_bytes() + b" " * (1 << 20))
    assert adapter.refused(description="long").kind == "unlock_malformed"
    (adapter.folder / "short").write_bytes(b"{}")
    assert adapter.refused(description="short").kind == "unlock_malformed"
