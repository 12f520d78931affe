"""Key files: what is read, what is refused, and that nothing is overwritten or left behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from model_package import key_files, secret
from model_package.refusal import KeyRefused, Refusal

KEY = bytes(range(128, 160))


def key_file(path: Path, content: bytes, mode: int = 0o400) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refusal_of(path: Path, **options: bool) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        key_files.read_file(path, **options)
    assert raised.value.__context__ is None
    return raised.value.refusal


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().encode() + b"\n"])
@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_key_is_read_raw_and_as_hex(tmp_path: Path, content: bytes, mode: int) -> None:
    read = key_files.read_file(key_file(tmp_path / "key", content, mode))
    assert isinstance(read, bytearray) and read == KEY


@pytest.mark.parametrize(
    "content",
    [
        b"",
        KEY[:-1],
        KEY + b"\n",
        KEY.hex().encode()[:-1],
        KEY.hex().upper().encode(),
        KEY.hex().encode() + b"\r\n",
        KEY.hex().encode() + b"\n\n",
        b"0x" + KEY.hex().encode()[2:],
        KEY.hex().encode()[:-1] + b"g",
        KEY.hex().encode() * 2,
        b" " + KEY.hex().encode(),
    ],
)
def test_a_key_of_another_form_is_refused(tmp_path: Path, content: bytes) -> None:
    assert refusal_of(key_file(tmp_path / "key", content)) is Refusal.KEY_LENGTH_WRONG


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o420, 0o402, 0o410, 0o644, 0o777])
def test_a_key_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "key", KEY, mode)
    assert refusal_of(path) is Refusal.KEY_EXPOSED
    assert key_files.read_file(path, private=False) == KEY  # where the platform decides the mode


def test_links_are_followed_and_the_mode_behind_them_counts(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file(tmp_path / "key", KEY))
    assert key_files.read_file(link) == KEY
    (tmp_path / "key").chmod(0o444)
    assert refusal_of(link) is Refusal.KEY_EXPOSED


def test_what_is_no_file_is_refused_and_a_pipe_does_not_hold_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert refusal_of(tmp_path / "pipe") is Refusal.KEY_NOT_REGULAR
    assert refusal_of(tmp_path) is Refusal.KEY_NOT_REGULAR
    assert refusal_of(Path("/dev/null")) is Refusal.KEY_NOT_REGULAR
    assert refusal_of(tmp_path / "none") is Refusal.KEY_MISSING
    assert refusal_of(key_file(tmp_path / "key", KEY) / "below") is Refusal.KEY_MISSING


def test_a_file_that_cannot_be_opened_is_told_from_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal_of(tmp_path / "loop") is Refusal.KEY_UNREADABLE


def test_a_key_file_is_removed_when_asked(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", KEY)
    assert key_files.read_file(path, unlink=True) == KEY
    assert not path.exists()


def test_a_key_that_could_not_be_removed_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiped: list[bytes] = []

    def refuse(_: Path) -> None:
        raise PermissionError

    def spy(key: bytearray) -> None:
        wiped.append(bytes(key))
        secret.wipe(key)

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(key_files, "wipe", spy)
    path = key_file(tmp_path / "key", KEY.hex().encode())
    assert refusal_of(path, unlink=True) is Refusal.KEY_NOT_UNLINKED
    assert wiped[-1] == KEY


def test_a_refused_file_is_not_removed(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", b"short")
    assert refusal_of(path, unlink=True) is Refusal.KEY_LENGTH_WRONG
    assert path.exists()


def test_a_descriptor_is_read_to_its_end_and_closed() -> None:
    reading, writing = os.pipe()

    def feed() -> None:
        for part in (KEY.hex()[:7], KEY.hex()[7:], "\n"):
            os.write(writing, part.encode())
        os.close(writing)

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert key_files.read_descriptor(reading) == KEY
    feeder.join()
    with pytest.raises(OSError):
        os.fstat(reading)


def test_a_descriptor_that_is_not_open_or_not_readable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyRefused) as raised:
        key_files.read_descriptor(1_000_000)
    assert raised.value.refusal is Refusal.KEY_MISSING
    writable_only = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(KeyRefused) as raised:
        key_files.read_descriptor(writable_only)
    assert raised.value.refusal is Refusal.KEY_UNREADABLE
    with pytest.raises(OSError):  # closed all the same
        os.fstat(writable_only)


def test_an_endless_descriptor_is_read_no_further_than_a_key() -> None:
    zeros = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(KeyRefused) as raised:
        key_files.read_descriptor(zeros)
    assert raised.value.refusal is Refusal.KEY_LENGTH_WRONG


def test_what_is_read_is_wiped_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytearray] = []

    def spy(key: bytearray) -> None:
        seen.append(key)
        secret.wipe(key)

    monkeypatch.setattr(key_files, "wipe", spy)
    key_files.read_file(key_file(tmp_path / "key", KEY.hex().encode()))
    assert len(seen) == 2 and not any(any(buffer) for buffer in seen)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_written_key_is_private_and_reads_back(tmp_path: Path, umask: int) -> None:
    path, key = tmp_path / "key", bytearray(KEY)
    before = os.umask(umask)
    try:
        key_files.write_new(path, key)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.read_bytes() == KEY.hex().encode() + b"\n"
    assert key_files.read_file(path) == KEY == key


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key", b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in (path, tmp_path / "link", tmp_path):
        with pytest.raises(KeyRefused) as raised:
            key_files.write_new(taken, bytearray(KEY))
        assert raised.value.refusal is Refusal.KEY_FILE_EXISTS
    assert path.read_bytes() == b"precious" and not (tmp_path / "elsewhere").exists()
    with pytest.raises(KeyRefused) as raised:
        key_files.write_new(tmp_path / "none" / "key", bytearray(KEY))
    assert raised.value.refusal is Refusal.KEY_NOT_WRITTEN


def test_nothing_is_left_of_a_key_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyRefused) as raised:
        key_files.write_new(tmp_path / "key", bytearray(KEY))
    assert raised.value.refusal is Refusal.KEY_NOT_WRITTEN
    assert not list(tmp_path.iterdir())
