"""A sound release verifies, every tampering is refused, and so is one that contradicts itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.image import archive
from infra.release import files, openssl, verify
from infra.release.files import ReleaseRefused
from infra.release.openssl import SigningRefused
from tests.infra.release.releases import read, release_in, signed_again
from tests.infra.tiny_image import EPOCH_S, TinyImage

Change = Callable[[Path], object]


def test_a_sound_release_verifies_by_key_and_by_fingerprint(release: Path, vendor: Path) -> None:
    said = verify.verify(release, vendor, None)
    assert (said.version, said.variant, said.tag, said.created_s) == ("1", "cpu", "tiny:1", EPOCH_S)
    assert said.image_id == archive.identify(release / files.ARCHIVE).image_id
    shown = openssl.fingerprint(vendor)
    spaced = ":".join(shown[i : i + 2] for i in range(0, 64, 2)).upper()
    assert verify.verify(release, None, shown) == verify.verify(release, None, spaced) == said
    verify.compare(said, said.image_id)
    with pytest.raises(ReleaseRefused, match="is not the one that was released"):
        verify.compare(said, "sha256:" + "0" * 64)


def test_the_signature_is_checked_by_openssl_alone(release: Path, vendor: Path) -> None:
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(vendor)]
    command += ["-sigfile", str(release / files.SIGNATURE), "-in", str(release / files.RELEASE)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    with (release / files.RELEASE).open("ab") as file:
        file.write(b" ")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_two_releases_of_one_image_are_the_same_bytes(made: Path, tmp_path: Path, key: Path) -> None:
    release_in(tmp_path / "release", key)
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted([*files.LISTED, files.RELEASE, files.SIGNATURE, files.PUBLIC_KEY])
    for name in names:
        assert (made / name).read_bytes() == (tmp_path / "release" / name).read_bytes(), name


def flip(name: str, at: float) -> Change:
    """Flip one bit at this share of a file."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        (folder / name).write_bytes(content)

    return change


def swap(folder: Path) -> None:
    one, other = (folder / name for name in (files.CYCLONEDX, files.SPDX))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def link(folder: Path) -> None:
    (folder / files.SPDX).rename(folder.parent / "elsewhere")
    (folder / files.SPDX).symlink_to(folder.parent / "elsewhere")


ALL = (*files.LISTED, files.RELEASE, files.SIGNATURE)
TAMPERINGS: dict[str, tuple[Change, str]] = {
    **{f"{name} flipped": (flip(name, 0.5), "is not what was signed") for name in files.LISTED},
    "archive flipped at its start": (flip(files.ARCHIVE, 0.0), "is not what was signed"),
    "archive flipped at its end": (flip(files.ARCHIVE, 1.0), "is not what was signed"),
    "release flipped": (flip(files.RELEASE, 0.5), "the signature does not hold"),
    "signature flipped": (flip(files.SIGNATURE, 0.5), "the signature does not hold"),
    "signature cut": (lambda f: (f / files.SIGNATURE).write_bytes(b"x" * 63), "the signature does not hold"),
    **{f"{name} missing": (lambda f, n=name: (f / n).unlink(), "is missing") for name in ALL},
    "public key flipped": (flip(files.PUBLIC_KEY, 0.5), "is not the key that signed"),
    "text beside the public key": (
        lambda f: (f / files.PUBLIC_KEY).write_bytes(b"x\n" + (f / files.PUBLIC_KEY).read_bytes()),
        "is not the key that signed",
    ),
    "a file more": (lambda f: (f / "extra.sh").write_text("x"), "does not belong"),
    "a hidden file more": (lambda f: (f / ".extra").write_text("x"), "does not belong"),
    "a name with a line end": (lambda f: (f / "a\nb").write_text("x"), "does not belong"),
    "a folder more": (lambda f: (f / "folder").mkdir(), "no plain file"),
    "a link in place of a file": (link, "no plain file"),
    "a pipe more": (lambda f: os.mkfifo(f / "pipe"), "no plain file"),
    "two files swapped": (swap, "is not what was signed"),
    "an empty release": (lambda f: (f / files.RELEASE).write_bytes(b""), "the signature does not hold"),
    "a huge release": (lambda f: (f / files.RELEASE).write_bytes(b" " * 70_000), "no plain file"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_every_tampering_is_refused_in_words(release: Path, vendor: Path, name: str) -> None:
    change, said = TAMPERINGS[name]
    change(release)
    with pytest.raises((ReleaseRefused, SigningRefused), match=said):
        verify.verify(release, vendor, None)


def test_a_release_by_another_key_is_refused(release: Path, vendor: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    openssl.make_key(other)
    signed_again(release, other, lambda _: None)
    (release / files.PUBLIC_KEY).write_bytes(openssl.public_key(other))
    with pytest.raises(SigningRefused, match="the signature does not hold"):
        verify.verify(release, vendor, None)
    with pytest.raises(ReleaseRefused, match="another fingerprint"):
        verify.verify(release, None, openssl.fingerprint(vendor))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(image_id="sha256:" + "0" * 64), "another image than the release names"),
        (lambda d: d.update(manifest_digest="sha256:" + "0" * 64), "another image than the release names"),
        (lambda d: d.update(kind="strongroom release 2"), "is not of the form"),
        (lambda d: d.update(more=1), "is not of the form"),
        (lambda d: d["files"].pop(files.SPDX), "is not of the form"),
    ],
)
def test_a_release_that_contradicts_itself_is_refused_though_it_is_signed(
    release: Path, vendor: Path, key: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    signed_again(release, key, change)
    with pytest.raises(ReleaseRefused, match=said):
        verify.verify(release, vendor, None)


@pytest.mark.parametrize("form", [files.CYCLONEDX, files.SPDX])
@pytest.mark.parametrize("fault", ["a part less", "a part more"])
def test_a_bill_that_is_not_the_image_s_is_refused(
    release: Path, vendor: Path, key: Path, form: str, fault: str
) -> None:
    document = read(release / form)
    parts = document["components" if form == files.CYCLONEDX else "packages"]
    if fault == "a part less":
        parts.pop()
    else:
        parts.append(json.loads(json.dumps(parts[-1]).replace("3.1.3", "3.1.4")))
        parts[-1]["SPDXID"] = "SPDXRef-more"
    (release / form).write_text(json.dumps(document))
    signed_again(release, key, lambda _: None)
    with pytest.raises(ReleaseRefused, match=r"1 differences|cannot be compared"):
        verify.verify(release, vendor, None)


def test_another_kind_of_key_signs_and_verifies_nothing(tmp_path: Path) -> None:
    rsa, public = tmp_path / "rsa.pem", tmp_path / "rsa.pub"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(rsa)],
        capture_output=True,
        check=True,
    )
    with pytest.raises(SigningRefused):
        openssl.sign(rsa, b"x")
    public.write_bytes(openssl.public_key(rsa))
    with pytest.raises(SigningRefused, match="not an Ed25519 key"):
        openssl.verify(public, b"x", b"y" * 64)


def test_a_machine_without_openssl_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openssl, "PROGRAM", str(tmp_path / "gone"))
    with pytest.raises(SigningRefused, match="`openssl` is not there"):
        openssl.fingerprint(tmp_path)


def test_a_private_key_is_for_its_owner_and_never_overwritten(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        openssl.make_key(key)


def test_the_command_says_in_one_line_of_json_what_it_found(
    release: Path, vendor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(release), "--key", str(vendor)]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    (release / files.SPDX).unlink()
    assert verify.main([str(release), "--key", str(vendor)]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out) == {"ok": False, "error": "`sbom.spdx.json` is missing"}
    assert "hint: get the release again" in told.err


def test_an_archive_whose_layer_is_another_has_no_identity(tmp_path: Path) -> None:
    tiny = TinyImage()
    saved = tiny.save(tmp_path / "image.tar")
    content = saved.read_bytes()
    config = content.index(b'"diff_ids": ["sha256:') + len(b'"diff_ids": ["sha256:')
    saved.write_bytes(content[:config] + b"0" * 64 + content[config + 64 :])
    with pytest.raises(archive.ArchiveRefused, match="is not the one that the configuration names"):
        archive.identify(saved)
