"""Key sources: the closed list of URIs, and what each gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_package.refusal import WORDS, KeyRefused, Refusal
from model_package.sources import (
    ChannelSource,
    DescriptorSource,
    EnvironmentSource,
    FileSource,
    Source,
    SplitSource,
    inner,
    source,
    split,
)

KEY = bytes(range(64, 96))


def write(path: Path, content: bytes = KEY, mode: int = 0o400) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refusal_of(uri: str, *, development: bool = False) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        source(uri, {}, development=development)
    return raised.value.refusal


@pytest.mark.parametrize(
    "uri",
    ["", "file", "/run/secrets/key", "http://x/key", "FILE:/x", "File:/x", "base64:AAAA", "vault:x", ":x"],
)
def test_a_source_outside_the_list_is_refused(uri: str) -> None:
    expected = Refusal.SOURCE_MALFORMED if uri == "file" else Refusal.SOURCE_UNKNOWN
    assert refusal_of(uri) is expected


@pytest.mark.parametrize(
    "uri",
    [
        "file:",
        "file:relative/path",
        "file://",
        "file:/a?unlink=1",
        "file:/a?unlink?unlink",
        "file:/a\0b",
        "file:/a,/b",
        "file:/" + "a" * 4096,
        "fd:",
        "fd:0",
        "fd:2",
        "fd:-1",
        "fd:03",
        "fd:+3",
        "fd:3 ",
        "fd:1000000",
        "fd:٣",
        "channel:",
        "channel:../x",
        "channel:a/b",
        "channel:-a",
        "channel:" + "a" * 65,
        "image:/a",
        "image:/a,/b,/c",
        "image:/a,b",
        "image:,",
    ],
)
def test_a_source_in_another_form_is_refused(uri: str) -> None:
    assert refusal_of(uri) is Refusal.SOURCE_MALFORMED


@pytest.mark.parametrize("uri", ["env:", "env:1A", "env:A-B", "env:A=B", "env:" + "A" * 129])
def test_a_variable_in_another_form_is_refused(uri: str) -> None:
    assert refusal_of(uri, development=True) is Refusal.SOURCE_MALFORMED


def test_parsing_reads_nothing(tmp_path: Path) -> None:
    assert isinstance(source(f"file:{tmp_path}/none", {}), FileSource)
    assert isinstance(source("fd:999", {}), DescriptorSource)
    assert isinstance(source("channel:none", {}), ChannelSource)
    assert isinstance(source("image:/none,/none", {}), SplitSource)
    assert isinstance(source("env:NONE", {}, development=True), EnvironmentSource)


def test_a_file_is_read_as_often_as_asked_unless_it_is_unlinked(tmp_path: Path) -> None:
    path = write(tmp_path / "key")
    kept = source(f"file:{path}", {})
    assert kept.read() == KEY == kept.read()
    assert kept.reusable and not kept.caution
    once = source(f"file:{path}?unlink", {})
    assert not once.reusable and once.read() == KEY and not path.exists()


def test_a_descriptor_is_read_once(tmp_path: Path) -> None:
    descriptor = os.open(write(tmp_path / "key"), os.O_RDONLY)
    inherited = source(f"fd:{descriptor}", {})
    assert not inherited.reusable and inherited.read() == KEY
    other = os.open(write(tmp_path / "other", bytes(32)), os.O_RDONLY)
    assert other == descriptor  # the number belongs to something else now
    with pytest.raises(KeyRefused) as raised:
        inherited.read()
    assert raised.value.refusal is Refusal.SOURCE_USED_UP
    os.close(other)


def test_a_memory_descriptor_is_read_though_its_mode_is_wide() -> None:
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    os.write(descriptor, KEY)
    os.lseek(descriptor, 0, os.SEEK_SET)
    assert os.fstat(descriptor).st_mode & 0o077
    assert source(f"fd:{descriptor}", {}).read() == KEY


def test_a_variable_is_for_development_and_is_removed() -> None:
    assert refusal_of("env:KEY") is Refusal.SOURCE_FOR_DEVELOPMENT
    environment = {"KEY": KEY.hex(), "OTHER": "x"}
    named = source("env:KEY", environment, development=True)
    assert named.read() == KEY
    assert environment == {"OTHER": "x"}
    assert "environ" in named.caution and not named.reusable
    with pytest.raises(KeyRefused) as raised:
        named.read()
    assert raised.value.refusal is Refusal.KEY_MISSING


@pytest.mark.parametrize("text", ["", "x" * 32, KEY.hex()[:-1], KEY.hex().upper(), "\ud800" * 64])
def test_a_variable_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(KeyRefused) as raised:
        source("env:KEY", {"KEY": text}, development=True).read()
    assert raised.value.refusal is Refusal.KEY_LENGTH_WRONG


def test_the_repr_of_a_variable_source_shows_no_environment() -> None:
    assert KEY.hex() not in repr(source("env:KEY", {"KEY": KEY.hex()}, development=True))


def test_a_channel_is_read_whatever_mode_the_platform_gave_it(tmp_path: Path) -> None:
    write(tmp_path / "customer-key" / "key", KEY.hex().encode(), 0o644)
    assert source("channel:customer-key", {}, channels=tmp_path).read() == KEY
    with pytest.raises(KeyRefused) as raised:
        source("channel:absent", {}, channels=tmp_path).read()
    assert raised.value.refusal is Refusal.KEY_MISSING


def shares(tmp_path: Path, first: bytes, second: bytes) -> Source:
    write(tmp_path / "image", first, 0o444)
    write(tmp_path / "artifact", second, 0o444)
    return source(f"image:{tmp_path}/image,{tmp_path}/artifact", {})


def test_two_shares_make_the_key_and_neither_is_it(tmp_path: Path) -> None:
    first, second = split(bytearray(KEY))
    assert KEY not in (first, second)
    assert shares(tmp_path, first, second).read() == KEY
    assert shares(tmp_path, second, first).read() == KEY
    assert "obfuscation" in shares(tmp_path, first, second).caution


def test_the_same_share_twice_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(KeyRefused) as raised:
        shares(tmp_path, KEY, KEY).read()
    assert raised.value.refusal is Refusal.SHARES_EQUAL


def test_a_missing_share_is_refused(tmp_path: Path) -> None:
    whole = shares(tmp_path, KEY, bytes(32))
    (tmp_path / "artifact").unlink()
    with pytest.raises(KeyRefused) as raised:
        whole.read()
    assert raised.value.refusal is Refusal.KEY_MISSING


def test_every_refusal_has_its_own_message_and_a_next_move() -> None:
    assert set(WORDS) == set(Refusal)
    messages = [message for message, _ in WORDS.values()]
    assert len(set(messages)) == len(messages)
    for message, hint in WORDS.values():
        assert hint and message[0] in "`" + message[0].lower() and not (message + hint).endswith(".")
    error = KeyRefused(Refusal.KEY_MISSING)
    assert str(error) == f"{error.message}\nhint: {error.hint}"


@pytest.mark.parametrize(
    ("uri", "read"),
    [
        ("file:/a", "file:/a"),
        ("fd:7", "fd:7"),
        ("recipient:fd:7", "fd:7"),
        ("licence:/a,file:/b?unlink", "file:/b?unlink"),
        ("license:/a,fd:7", "fd:7"),
        ("licence:/a", ""),
        ("kms:arn:aws:kms", None),
        ("invocation:", None),
        ("attest:", None),
        ("nonsense", "nonsense"),
    ],
)
def test_what_is_read_of_a_key_source_is_told_apart(uri: str, read: str | None) -> None:
    assert inner(uri) == read
