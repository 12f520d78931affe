"""Sealing: what is refused, what an interruption leaves, how it goes on, and 20 kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_package import sealer, sealing, storage, unsealing
from model_package.opener import open_package
from model_package.outcome import Outcome, PackageError
from model_package.sealing import SealError
from tests.model_package import making
from tests.model_package.making import CHUNK

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
# Stops before the Nth flush or rename: each is a point after which something new is on the disk for good.
CHILD = """
import os, signal, sys
from pathlib import Path
from model_package import storage
from tests.model_package import making

left = int(sys.argv[3])

def counting(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

class Watched:
    def __getattr__(self, name):
        return getattr(os, name)

storage.os = Watched()
storage.os.pwrite = counting(os.pwrite)
storage.os.fsync = counting(os.fsync)
storage.os.rename = counting(os.rename)
making.seal(Path(sys.argv[1]), Path(sys.argv[2]))
print(10**6 - left)
"""


def outcome_of(path: Path) -> Outcome:
    try:
        with making.opened(path) as contents:
            making.read_all(contents)
    except PackageError as error:
        return error.outcome
    return Outcome.OPENED


def child(source: Path, destination: Path, steps: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(destination), str(steps)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_kill_at_any_of_20_points_leaves_nothing_that_opens_and_the_rest_can_be_done(
    tmp_path: Path,
) -> None:
    """SIGKILL just before a write, a flush or a rename, spread from the first to the last."""
    source = making.model(tmp_path / "plain")
    done = child(source, tmp_path / "whole", 10**6)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert outcome_of(tmp_path / "whole") is Outcome.OPENED
    assert steps > KILLS
    manifest_rename = steps - 2  # then the folder is flushed; the record of progress is only unlinked
    for number in range(KILLS):
        destination = tmp_path / f"killed {number}"
        killed = child(source, destination, round(number * manifest_rename / (KILLS - 1)))
        assert killed.returncode == -signal.SIGKILL
        assert outcome_of(destination) is Outcome.MANIFEST_MISSING
        making.seal(source, destination)
        with making.opened(destination) as contents:
            assert making.read_all(contents) == making.plain(source)
        stored = {entry.stored_name for entry in open_package(destination, making.trust()).manifest.files}
        assert set(os.listdir(destination)) == stored | {"manifest.json", "manifest.sig"}


def test_kills_in_time_leave_nothing_that_opens_half(tmp_path: Path) -> None:
    """Whatever the process was doing: either no package, or all of it."""
    source = making.model(tmp_path / "plain")
    for number in range(6):
        destination = tmp_path / f"killed {number}"
        process = subprocess.Popen([sys.executable, "-c", CHILD, source, destination, "1000000"], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not destination.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(number * 0.003)
        process.kill()
        process.wait(timeout=60)
        assert outcome_of(destination) in {Outcome.MANIFEST_MISSING, Outcome.OPENED}


def test_an_interrupted_sealing_goes_on_with_what_is_done(tmp_path: Path) -> None:
    """Files done before stay as they are; the one in work is sealed under a new id."""
    source = making.model(tmp_path / "plain")
    destination = tmp_path / "sealed"
    child(source, destination, 30)
    before = {path.name: path.stat().st_mtime_ns for path in destination.glob("*.sealed")}
    assert 1 <= len(before) < 4
    made = making.seal(source, destination)
    after = {path.name: path.stat().st_mtime_ns for path in destination.glob("*.sealed")}
    assert before.items() <= after.items()
    assert set(after) == {entry.stored_name for entry in made.files}


def test_a_source_changed_in_between_is_sealed_again(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    destination = tmp_path / "sealed"
    child(source, destination, 30)
    done = sorted(source.iterdir())[0]  # files are sealed in the order of their names
    before = {path.name for path in destination.glob("*.sealed")}
    done.write_bytes(done.read_bytes()[::-1])
    making.seal(source, destination)
    assert not before <= {path.name for path in destination.glob("*.sealed")}
    with making.opened(destination) as contents:
        assert making.read_all(contents) == making.plain(source)


@pytest.mark.parametrize("place", [None, 3, 70, -1])
def test_a_sealed_file_damaged_in_between_is_sealed_again(place: int | None, tmp_path: Path) -> None:
    """Cut short, or one bit of its header, index or last tag: a package is never completed around it."""
    source = making.model(tmp_path / "plain")
    destination = tmp_path / "sealed"
    child(source, destination, 30)
    damaged = next(iter(destination.glob("*.sealed")))
    raw = bytearray(damaged.read_bytes())
    if place is None:
        del raw[-5:]
    else:
        raw[place] ^= 1
    damaged.write_bytes(raw)
    making.seal(source, destination)
    assert outcome_of(destination) is Outcome.OPENED


def test_a_sealed_file_lost_in_between_is_sealed_again(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    destination = tmp_path / "sealed"
    child(source, destination, 30)
    next(iter(destination.glob("*.sealed"))).unlink()
    making.seal(source, destination)
    assert outcome_of(destination) is Outcome.OPENED


def test_another_key_does_not_go_on_where_one_began(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    child(source, tmp_path / "sealed", 30)
    with pytest.raises(SealError, match="another data key"):
        making.seal(source, tmp_path / "sealed", data_key="another")
    (tmp_path / "sealed" / sealer.PROGRESS_NAME).write_bytes(b"{")
    with pytest.raises(SealError, match="is damaged"):
        making.seal(source, tmp_path / "sealed")


def test_a_link_to_a_file_is_sealed_as_the_file(tmp_path: Path) -> None:
    """As a cache of downloads lays out its snapshots."""
    source = making.model(tmp_path / "plain")
    (tmp_path / "blob").write_bytes((source / "tokenizer.json").read_bytes())
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    making.seal(source, tmp_path / "sealed")
    with making.opened(tmp_path / "sealed") as contents:
        assert contents.file("tokenizer.json") == (tmp_path / "blob").read_bytes()


def test_a_package_and_a_strangers_files_are_never_written_over(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    making.seal(source, tmp_path / "sealed")
    with pytest.raises(SealError, match="holds a package already"):
        making.seal(source, tmp_path / "sealed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SealError, match="not empty"):
        making.seal(source, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_the_record_of_progress_holds_no_key_and_no_content(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    child(source, tmp_path / "sealed", 60)
    record = (tmp_path / "sealed" / sealer.PROGRESS_NAME).read_bytes()
    assert b"chat_template.jinja" in record
    assert making.key("data").hex().encode() not in record
    assert b"model.embed.weight" not in record and b"llama" not in record


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not safetensors"),
        (b"\x80\x02ck", "not safetensors"),
        ((2**40).to_bytes(8, "little") + b"{}", "not safetensors"),
        ((2).to_bytes(8, "little") + b"{]", "refused"),
        (making.safetensors([("a", "U8", (4,), b"four")])[:-1], "not as long"),
        (making.safetensors([("a", "U8", (4,), b"four")]) + b"x", "not as long"),
        (making.safetensors([("a/b", "U8", (4,), b"four")]), "refused"),
        (making.safetensors([("a", "U4", (4,), b"four")]), "refused"),
        (making.safetensors([], {str(number): "" for number in range(1025)}), "refused"),
    ],
)
def test_what_could_not_be_opened_is_not_sealed(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model.safetensors").write_bytes(content)
    with pytest.raises(SealError, match=said):
        making.seal(tmp_path / "plain", tmp_path / "sealed")
    assert not (tmp_path / "sealed").exists()


def test_names_that_a_package_cannot_hold_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(SealError, match="1 to 4096 files"):
        making.seal(tmp_path / "plain", tmp_path / "sealed")
    (tmp_path / "plain" / "two words.json").write_text("{}")
    with pytest.raises(SealError, match="a name that a package cannot hold"):
        making.seal(tmp_path / "plain", tmp_path / "sealed")
    (tmp_path / "plain" / "folder").symlink_to(tmp_path)
    with pytest.raises(SealError, match="a link leads to a folder"):
        making.seal(tmp_path / "plain", tmp_path / "sealed")
    (tmp_path / "plain" / "folder").unlink()
    os.mkfifo(tmp_path / "plain" / "pipe")
    (tmp_path / "plain" / "two words.json").unlink()
    with pytest.raises(SealError, match="not a regular file"):
        making.seal(tmp_path / "plain", tmp_path / "sealed")


def test_more_tensors_or_chunks_than_a_file_may_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = making.model(tmp_path / "plain")
    for name, most in (("MAX_TENSORS", 3), ("MAX_CHUNKS", 5), ("MAX_FILE_BYTES", 3 * CHUNK)):
        with monkeypatch.context() as patch:
            patch.setattr(sealing.layout, name, most)
            with pytest.raises(SealError, match="divide it"):
                making.seal(source, tmp_path / name)


def test_a_source_that_changes_while_it_is_sealed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = making.model(tmp_path / "plain")
    real = storage.read_into

    def changing(fd: int, offset: int, buffer: memoryview) -> None:
        real(fd, offset, buffer)
        (source / "chat_template.jinja").write_text("{{ something else }}")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_into", changing)
        with pytest.raises(SealError, match="changed while it was sealed"):
            making.seal(source, tmp_path / "sealed")
    assert outcome_of(tmp_path / "sealed") is Outcome.MANIFEST_MISSING
    os.truncate(source / "tokenizer.json", 2 * CHUNK)
    with pytest.raises(SealError, match="a data key has 32 bytes"):
        sealer.seal({}, tmp_path, None, bytearray(31), lambda _c, _k: [], bytearray(32))  # type: ignore[arg-type]


def test_progress_counts_every_plain_byte_once(tmp_path: Path) -> None:
    source = making.model(tmp_path / "plain")
    seen: list[tuple[int, int]] = []
    files = sealer.files_of(source)
    told = sealer.Sealing(making.Owner.VENDOR, making.Model("tiny", "1"), making.CREATED_S, threads=2)
    signer = making.key("vendor")
    sealer.seal(
        files, tmp_path / "sealed", told, making.key("data"), lambda _c, _k: [], signer,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in files.values()) - 8


def test_a_package_can_be_read_by_another_user_and_what_was_unsealed_cannot(tmp_path: Path) -> None:
    """A package copied to a host is served by the image's own user; what is plain stays its owner's."""
    source = making.model(tmp_path / "plain")
    before = os.umask(0o077)
    try:
        making.seal(source, tmp_path / "made" / "package")
        with making.opened(tmp_path / "made" / "package") as contents:
            unsealing.unseal(contents, tmp_path / "back")
    finally:
        os.umask(before)
    sealed = (tmp_path / "made" / "package").stat().st_mode & 0o777
    assert sealed == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "made" / "package").iterdir()} == {0o644}
    plain = [path for path in (tmp_path / "back").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in plain} == {0o600}
