"""A sound bundle verifies with a shell and openssl alone, every tampering is refused in words."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.airgap import save
from infra.image import build
from infra.release import files, openssl
from tests.infra.airgap.bundles import BIN, BUNDLE, sh

Change = Callable[[Path], object]
SCRIPTS = sorted(BIN.glob("*.sh"))


def test_a_sound_bundle_verifies_from_its_own_folder_too(bundle: Path, fingerprint: str) -> None:
    done = sh("verify.sh", fingerprint, bundle)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.fullmatch(rf"sound: \d+ files, signed by {fingerprint}\n", done.stderr)
    own = subprocess.run(["/bin/sh", str(bundle / "bin" / "verify.sh"), fingerprint.upper()], check=False)
    assert own.returncode == 0
    shown = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2))
    assert sh("verify.sh", shown, bundle).returncode == 0


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    def changed(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return changed


def flip(name: str) -> Change:
    return edit(name, lambda content: bytes([content[0] ^ 1]) + content[1:])


def list_again(folder: Path) -> None:
    """Make the sums right for what is there, without the key: what an attacker can do."""
    (folder / "docs" / "INSTALL.md").write_text("do this instead")
    for name in (save.SUMS, save.SIGNATURE):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        if name == save.SUMS:
            lines = "".join(
                f"{files.digest(folder / path)}  {path}\n"
                for path in save.paths(folder)
                if path != save.SIGNATURE
            )
            (folder / name).write_text(lines)
        else:
            (folder / name).write_bytes(kept)


def another_key(folder: Path) -> None:
    key = folder.parent / "attacker.pem"
    openssl.make_key(key)
    (folder / "keys" / "vendor.pub").write_bytes(openssl.public_key(key))
    for name in (save.SUMS, save.SIGNATURE):
        (folder / name).unlink()
    save.sign(folder, key)


def swap(folder: Path) -> None:
    one, other = (folder / "images" / name for name in (files.CYCLONEDX, files.SPDX))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def crafted(folder: Path) -> None:
    """A name with a line end whose lines are two names of the list, in place of those two."""
    one, other = folder / "docs" / "ERRORS.md", folder / "docs" / "KEYS.md"
    for path in (one, other):
        path.unlink()
    odd = folder / "docs" / "ERRORS.md\n." / "docs"
    odd.mkdir(parents=True)
    (odd / "KEYS.md").write_text("x")


NOT_SIGNED = "is not what was signed"
TAMPERINGS: dict[str, tuple[Change, str]] = {
    "the image flipped": (flip("images/strongroom.tar.gz"), NOT_SIGNED),
    "the manifest flipped": (flip("MANIFEST.json"), NOT_SIGNED),
    "a script flipped": (flip("bin/verify.sh"), NOT_SIGNED),
    "the model flipped": (flip("model/weights.sealed"), NOT_SIGNED),
    "the profile flipped": (flip("run/compose.yaml"), NOT_SIGNED),
    "the sums flipped": (flip(save.SUMS), "signature of `SHA256SUMS` does not hold"),
    "the signature flipped": (flip(save.SIGNATURE), "signature of `SHA256SUMS` does not hold"),
    "the key flipped": (
        edit("keys/vendor.pub", lambda content: content.replace(b"A", b"B", 1)),
        "the bundle's key has the fingerprint",
    ),
    "a file missing": (lambda f: (f / "docs" / "INSTALL.md").unlink(), "`docs/INSTALL.md` is missing"),
    "a part of the model missing": (lambda f: (f / "model/nested/part-000").unlink(), "part-000` is missing"),
    "the sums missing": (lambda f: (f / save.SUMS).unlink(), "`SHA256SUMS` is missing"),
    "the signature missing": (lambda f: (f / save.SIGNATURE).unlink(), "`SHA256SUMS.sig` is missing"),
    "the key missing": (lambda f: (f / "keys" / "vendor.pub").unlink(), "`keys/vendor.pub` is missing"),
    "a file more": (
        lambda f: (f / "bin" / "extra.sh").write_text("x"),
        "a file is there that was not signed",
    ),
    "a hidden file more": (lambda f: (f / ".x").write_text("x"), "a file is there that was not signed"),
    "a name with a line end": (lambda f: (f / "a\nb").write_text("x"), "a file is there that was not signed"),
    "a name made of two signed names": (crafted, NOT_SIGNED),
    "a link": (lambda f: (f / "docs" / "x").symlink_to("/etc/passwd"), "holds a link"),
    "a link in place of a file": (
        lambda f: [(f / "LICENSE").unlink(missing_ok=True), (f / "LICENSE").symlink_to("docs/LICENSE")],
        "holds a link",
    ),
    "a folder that is a link": (lambda f: (f / "more").symlink_to("docs"), "holds a link"),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), "holds a link, a device or a pipe"),
    "a set-user file": (lambda f: (f / "bin" / "run.sh").chmod(0o4755), "set-user"),
    "a file that all can write": (lambda f: (f / "bin" / "run.sh").chmod(0o666), "writable by all"),
    "two files swapped": (swap, NOT_SIGNED),
    "an old signature on new sums": (list_again, "signature of `SHA256SUMS` does not hold"),
    "all signed again by another key": (another_key, "the bundle's key has the fingerprint"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_every_tampering_is_refused_in_words(bundle: Path, fingerprint: str, name: str) -> None:
    change, said = TAMPERINGS[name]
    change(bundle)
    done = sh("verify.sh", fingerprint, bundle)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert "\nhint: " in done.stderr and "sound" not in done.stderr


def test_every_single_file_is_covered(bundle: Path, fingerprint: str) -> None:
    for path in [bundle / name for name in save.paths(bundle)]:
        kept = path.read_bytes()
        place = len(kept) // 2
        path.write_bytes(kept[:place] + bytes([kept[place] ^ 4]) + kept[place + 1 :])
        if (
            path.name in (save.SUMS, save.SIGNATURE)
            or path.suffix in (".gz", ".pub")
            or path.parent == bundle
        ):
            assert sh("verify.sh", fingerprint, bundle).returncode == 5, path
        else:  # the same check without openssl, which is what decides here
            done = subprocess.run(
                ["sha256sum", "--check", "--strict", "--quiet", save.SUMS],
                cwd=bundle,
                capture_output=True,
                check=False,
            )
            assert done.returncode == 1, path
        path.write_bytes(kept)
    assert sh("verify.sh", fingerprint, bundle).returncode == 0


def test_sums_that_were_signed_and_are_odd_are_refused(bundle: Path, fingerprint: str, vendor: Path) -> None:
    sums = bundle / save.SUMS
    for line in ("0" * 64 + "  ../outside\n", "0" * 64 + " *docs/x\n", "text\n", "0" * 63 + "  docs/x\n"):
        content = sums.read_text() + line
        changed = Path(shutil.copytree(bundle, bundle.parent / hashlib.sha256(line.encode()).hexdigest()[:8]))
        (changed / save.SUMS).write_text(content)
        (changed / save.SIGNATURE).write_bytes(openssl.sign(vendor, content.encode()))
        done = sh("verify.sh", fingerprint, changed)
        assert done.returncode == 5 and "holds a line that is none" in done.stderr, line


@pytest.mark.parametrize("missing", ["openssl", "sha256sum"])
def test_without_a_program_nothing_is_called_sound(
    bundle: Path, fingerprint: str, tmp_path: Path, missing: str
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("openssl", "sha256sum", "find", "sort", "cmp", "sed", "tr", "dirname", "head", "cut"):
        found = shutil.which(name)
        assert found is not None
        if name != missing:
            (programs / name).symlink_to(found)
    done = sh("verify.sh", fingerprint, bundle, PATH=str(programs))
    assert done.returncode == 3
    assert f"error: `{missing}` is not there" in done.stderr and "nothing was verified" in done.stderr


def test_an_openssl_without_rawin_is_named_as_the_reason(
    bundle: Path, fingerprint: str, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    real = shutil.which("openssl")
    program = (
        f'#!/bin/sh\n[ "$1" = pkeyutl ] && {{ echo "pkeyutl: unknown option"; exit 1; }}\nexec {real} "$@"\n'
    )
    (old / "openssl").write_text(program)
    (old / "openssl").chmod(0o755)
    done = sh("verify.sh", fingerprint, bundle, PATH=f"{old}:{os.environ['PATH']}")
    assert done.returncode == 3
    assert "too old" in done.stderr and "nothing was verified" in done.stderr


@pytest.mark.parametrize(("script", "arguments"), [("verify.sh", ()), ("load.sh", ()), ("run.sh", ("a",))])
def test_a_wrong_call_says_how_it_is_called(script: str, arguments: tuple[str, ...]) -> None:
    done = sh(script, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: sh ")


# The scripts as such.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_plain_shell_and_call_nothing_that_reaches_out(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/bin/sh\n") and "\nset -eu\n" in text
    assert subprocess.run(["/bin/sh", "-n", str(script)], check=False).returncode == 0
    assert not re.search(r"\[\[|\bfunction \w|\bcurl\b|\bwget\b|\bpull\b|\bpush\b|<<<|\blocal\b", text)


def test_verifying_opens_no_connection(bundle: Path, fingerprint: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=connect,socket", "-o", str(trace), "/bin/sh"]
    command += [str(bundle / "bin" / "verify.sh"), fingerprint]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert trace.read_text().count("+++ exited with 0 +++") > 5
    assert "AF_INET" not in trace.read_text()


def test_the_version_of_the_bundle_is_the_image_s(packed: Path) -> None:
    assert packed.stem == BUNDLE
    assert build.NAME in packed.name
