"""Image archives are written the same whenever their contents are, and what would be lost is refused."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from infra.image import archive, size
from infra.image.archive import ArchiveRefused, Identity
from infra.image.subject import SITE, Image
from tests.infra.tiny_image import EPOCH_S, File, TinyImage, layer_tar

LATER_S = EPOCH_S + 4711


def normalised(tiny: TinyImage, folder: Path, epoch_s: int = EPOCH_S) -> tuple[Identity, Path]:
    folder.mkdir()
    target = folder / "plain.tar"
    return archive.normalise(tiny.save(folder / "saved.tar"), target, "tiny:1", epoch_s), target


def rebuilt() -> TinyImage:
    """The same contents as another builder leaves them: other times, names, order, history."""
    tiny = TinyImage()
    for one in tiny.files.values():
        one.mtime = LATER_S
    tiny.files = dict(reversed(tiny.files.items()))
    tiny.document["created"] = "2026-01-01T00:00:00.123456789Z"
    tiny.document["container"] = "f00"
    tiny.document["docker_version"] = "20.10"
    tiny.document["history"] = [{"created_by": "COPY dir:" + "c" * 64 + " in /", "created": "2026"}]
    tiny.config["Hostname"] = "f00"
    return tiny


def test_the_same_contents_have_the_same_digests_and_bytes(tmp_path: Path) -> None:
    one, first = normalised(TinyImage(), tmp_path / "one")
    other, second = normalised(rebuilt(), tmp_path / "other")
    assert one == other
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda tiny: tiny.files.__setitem__("etc/x", File(b"y")),
        lambda tiny: setattr(tiny.files["etc/group"], "mode", 0o600),
        lambda tiny: setattr(tiny.files["etc/group"], "content", b"changed"),
        lambda tiny: tiny.config.__setitem__("User", "0"),
        lambda tiny: tiny.config["Labels"].__setitem__("a", "b"),
    ],
)
def test_other_contents_have_another_digest(change: object, tmp_path: Path) -> None:
    one, _ = normalised(TinyImage(), tmp_path / "one")
    tiny = TinyImage()
    change(tiny)  # type: ignore[operator]
    other, _ = normalised(tiny, tmp_path / "other")
    assert one.image_id != other.image_id and one.manifest_digest != other.manifest_digest


def test_the_ids_are_the_hashes_docker_and_a_registry_compute(tmp_path: Path) -> None:
    identity, path = normalised(TinyImage(), tmp_path / "one")
    with tarfile.open(path) as written:
        described = json.load(member(written, "manifest.json"))[0]
        config = member(written, described["Config"]).read()
        layer = member(written, described["Layers"][0]).read()
    assert described["RepoTags"] == ["tiny:1"]
    assert identity.image_id == "sha256:" + hashlib.sha256(config).hexdigest()
    diff_ids = json.loads(config)["rootfs"]["diff_ids"]
    assert diff_ids == ["sha256:" + hashlib.sha256(layer).hexdigest()] == [identity.layers[0].digest]
    assert identity.layers[0].archive_bytes == len(layer)
    sizes = [len(one.content) for one in TinyImage().files.values()]
    assert identity.content_bytes > sum(sizes)


def member(written: tarfile.TarFile, name: str) -> io.BufferedReader:
    found = written.extractfile(name)
    assert isinstance(found, io.BufferedReader)
    return found


def test_the_result_passes_for_an_image_and_keeps_what_matters(tmp_path: Path) -> None:
    _, path = normalised(rebuilt(), tmp_path / "one")
    with Image(path) as image:
        assert image.config["User"] == "10001:10001"
        assert image.document["created"] == "2023-11-14T22:13:20Z"
        assert "container" not in image.document and "Hostname" not in image.config
        assert {entry.member.mtime for entry in image.entries} == {EPOCH_S}
        assert image.final["opt/strongroom/bin/python"].member.linkname == "/usr/bin/python3.11"
        assert image.document["history"][0]["created_by"] == "COPY dir in /"


def test_an_attribute_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    tiny = TinyImage()
    tiny.files["bin/ping"] = File(attributes={"SCHILY.xattr.security.capability": "x"})
    with pytest.raises(ArchiveRefused, match="`bin/ping` has attributes"):
        normalised(tiny, tmp_path / "one")


def test_an_archive_of_two_images_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "two.tar", "w") as two:
        content = b"[{}, {}]"
        described = tarfile.TarInfo("manifest.json")
        described.size = len(content)
        two.addfile(described, io.BytesIO(content))
    with pytest.raises(ArchiveRefused, match="2 images"):
        archive.normalise(tmp_path / "two.tar", tmp_path / "x.tar", "x", EPOCH_S)


def test_a_layer_that_two_steps_share_is_written_once(tmp_path: Path) -> None:
    tiny = TinyImage()
    same = {"etc/x": File(b"y")}
    tiny.other_layers += [same, same]
    identity, path = normalised(tiny, tmp_path / "one")
    with tarfile.open(path) as written:
        assert len(written.getnames()) == 4  # configuration, manifest, two different layers
    assert len(identity.layers) == 3 and identity.layers[1] == identity.layers[2]


def test_the_parts_of_an_image_add_up_and_the_large_ones_have_names(tmp_path: Path) -> None:
    tiny = TinyImage()
    tiny.files[f"{SITE}/torch/lib/libtorch_cpu.so"] = File(b"x" * 2000)
    tiny.files[f"{SITE}/torch/__pycache__/x.pyc"] = File(b"x" * 300)
    tiny.files[f"{SITE}/container/x.py"] = File(b"x" * 40)
    tiny.files["usr/lib/python3.11/os.py"] = File(b"x" * 50)
    with Image(tiny.save(tmp_path / "image.tar")) as image:
        monkey = pytest.MonkeyPatch()
        monkey.setattr(size, "NAMED_BYTES", 2000)
        held = size.parts(image.files())
        monkey.undo()
        assert sum(held.values()) == sum(entry.member.size for entry in image.files())
    assert next(iter(held)) == "torch: libtorch_cpu.so"
    assert (held[size.BYTE_CODE], held["our own code"], held["Python's standard library"]) == (300, 40, 50)
    assert size.SMALL in held


def test_a_base_is_made_of_a_root_and_nothing_of_when(tmp_path: Path) -> None:
    ids = []
    for number, mtime in enumerate((EPOCH_S, LATER_S)):
        root = tmp_path / f"root{number}.tar"
        hard = tarfile.TarInfo("bin/a")  # a hard link may come before what it points to
        hard.type, hard.linkname, hard.mtime = tarfile.LNKTYPE, "bin/b", mtime
        root.write_bytes(layer_tar({"bin/b": File(b"b", mtime=mtime)}))
        with tarfile.open(root, "a") as more:
            more.addfile(hard)
        target = tmp_path / f"base{number}.tar"
        ids.append(archive.from_root(root, target, "base:1", "amd64", EPOCH_S).image_id)
        with Image(target) as image:
            assert [entry.path for entry in image.entries] == ["bin/b", "bin/a"]
            assert image.document["architecture"] == "amd64"
    assert ids[0] == ids[1]
