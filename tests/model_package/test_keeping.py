"""A key kept behind a descriptor: handed to children, out of the keeper's own memory."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model_package import keeping, signing_keys
from model_package.providers import Given
from model_package.refusal import KeyRefused, Refusal
from tests.model_package.memory_scan import masked

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(100, 132))


@pytest.fixture(params=["memfd_secret", "memfd"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> keeping.Kept:
    """A kept key in the page that the kernel grants, and in the one that stands in for it."""
    if request.param == "memfd":
        monkeypatch.setattr(keeping, "_SYS_MEMFD_SECRET", -1)
    made = keeping.keep(bytearray(KEY))
    request.addfinalizer(made.close)
    return made


def test_a_kept_key_is_read_as_often_as_asked(kept: keeping.Kept) -> None:
    source = keeping.KeptSource(kept.descriptor)
    assert source.read() == KEY == source.read()
    assert source.reusable and Given(source).reusable


def test_a_kept_key_does_not_reach_a_child_unasked(kept: keeping.Kept) -> None:
    assert fcntl.fcntl(kept.descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_a_child_that_is_handed_the_descriptor_reads_the_key(kept: keeping.Kept) -> None:
    program = (
        "import sys; from model_package import keeping, signing_keys; key = keeping.fetch(int(sys.argv[1]));"
    )
    program += "print(signing_keys.public_of(key).hex())"
    command = [sys.executable, "-c", program, str(kept.descriptor)]
    shown = [
        subprocess.run(
            command, cwd=ROOT, pass_fds=[kept.descriptor], capture_output=True, text=True, timeout=60
        )
        for _ in range(2)
    ]
    public = signing_keys.public_of(bytearray(KEY)).hex()
    assert [done.stdout.strip() for done in shown] == [public, public], shown[0].stderr


def test_a_page_that_stands_in_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_SYS_MEMFD_SECRET", -1)
    made = keeping.keep(bytearray(KEY))
    try:
        assert not made.secret
        with pytest.raises(PermissionError):
            os.pwrite(made.descriptor, bytes(32), 0)
        with pytest.raises(PermissionError):
            os.ftruncate(made.descriptor, 0)
    finally:
        made.close()


def test_the_keepers_own_memory_holds_no_copy() -> None:
    program = """
import json, sys
from model_package import keeping, secret
from tests.model_package.memory_scan import copies, unmasked
given = {"key": sys.stdin.read()}
with secret.wiping(unmasked(given["key"])) as key:
    kept = keeping.keep(key)
    before = copies(given)
after = copies(given)
with secret.wiping(keeping.fetch(kept.descriptor)):
    during = copies(given)
print(json.dumps([before, after, during, copies(given)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        input=masked(os.urandom(32)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [count["key"] for count in json.loads(done.stdout)] == [1, 0, 1, 0]


def test_what_is_no_kept_key_is_refused(tmp_path: Path) -> None:
    empty = os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)
    reading, writing = os.pipe()
    for descriptor in (empty, reading, 1_000_000):
        with pytest.raises(KeyRefused) as raised:
            keeping.fetch(descriptor)
        assert raised.value.refusal is Refusal.KEY_MISSING
    for descriptor in (empty, reading, writing):
        os.close(descriptor)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_only_a_whole_key_is_kept(length: int) -> None:
    with pytest.raises(KeyRefused) as raised:
        keeping.keep(bytearray(length))
    assert raised.value.refusal is Refusal.KEY_LENGTH_WRONG


def test_a_key_for_which_there_is_no_page_is_refused_and_nothing_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(KeyRefused) as raised:
        keeping.keep(bytearray(KEY))
    assert raised.value.refusal is Refusal.KEY_NOT_WRITTEN
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_reserved_page_takes_one_key_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for secret in (True, False):
        if not secret:
            monkeypatch.setattr(keeping, "_SYS_MEMFD_SECRET", -1)
        page = keeping.reserve()
        request.addfinalizer(page.close)
        with pytest.raises(KeyRefused) as raised:
            keeping.fetch(page.descriptor)
        assert raised.value.refusal is Refusal.KEY_MISSING
        with pytest.raises(KeyRefused):
            keeping.fill(page.descriptor, bytearray(31))
        keeping.fill(page.descriptor, bytearray(KEY))
        with pytest.raises(KeyRefused) as raised:
            keeping.fill(page.descriptor, bytearray(32))
        assert raised.value.refusal is Refusal.KEY_NOT_WRITTEN
        assert keeping.fetch(page.descriptor) == KEY


def test_a_child_fills_the_page_that_its_parent_reserved() -> None:
    page = keeping.reserve()
    program = (
        "import sys; from model_package import keeping; keeping.fill(int(sys.argv[1]), bytearray(b'k' * 32))"
    )
    command = [sys.executable, "-c", program, str(page.descriptor)]
    done = subprocess.run(
        command, cwd=ROOT, pass_fds=[page.descriptor], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert keeping.fetch(page.descriptor) == b"k" * 32
    page.close()
