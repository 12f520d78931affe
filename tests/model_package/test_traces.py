"""What sealing and opening leave behind: no key in memory, no plain byte in a file or shared memory."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model_package.layout import LARGE_CHUNK_LOG2
from tests.model_package import making
from tests.model_package.forge import derive
from tests.model_package.memory_scan import masked

ROOT = Path(__file__).resolve().parents[2]
WINDOW_BYTES = 64
PREAMBLE = """
import json, os, sys
from pathlib import Path
from model_package import sealer
from model_package.opener import open_package
from tests.model_package import making
from tests.model_package.memory_scan import copies, unmasked
given = json.load(sys.stdin)
"""
OPEN = """
data_key = unmasked(given["secrets"]["data key"])
package = open_package(Path(given["sealed"]), making.trust())
with package, package.unlock(data_key, threads=given["threads"]) as contents:
    held = [bytearray(tensor.data_bytes) for tensor in contents.tensors("model.safetensors")]
    for memory, tensor in zip(held, contents.tensors("model.safetensors")):
        tensor.read_into(memory)
    blobs = [contents.file(name) for name in contents.names()]
    tensor = None
    during = copies(given["secrets"])
print(json.dumps({"during": during, "after": copies(given["secrets"])}))
"""
FAIL = """
from model_package.outcome import PackageError
data_key = unmasked(given["secrets"]["data key"])
try:
    with open_package(Path(given["sealed"]), making.trust()) as package:
        with package.unlock(data_key, threads=given["threads"]) as contents:
            making.read_all(contents)
except PackageError as error:
    print(json.dumps({"outcome": error.outcome, "after": copies(given["secrets"])}))
"""
SEAL = """
data_key = unmasked(given["secrets"]["data key"])
told = sealer.Sealing(
    making.Owner.VENDOR, making.Model("tiny", "1"), making.CREATED_S, threads=given["threads"]
)
files, signer = sealer.files_of(Path(given["plain"])), making.key("vendor")
sealer.seal(files, Path(given["sealed"]), told, data_key, lambda c, k: [], signer)
for place in range(32):
    data_key[place] = 0
print(json.dumps({"after": copies(given["secrets"])}))
"""


# Before and after a program, where Python itself is to say which files it opened for writing.
HOOK = """
opened = []

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            opened.append(os.fsdecode(arguments[0]))
    elif event == "os.memfd_create":
        opened.append("in memory")

sys.addaudithook(hook)
"""
HOOK_END = """
seen = [str(Path(given["sealed"]) / path).removesuffix(".partial") for path in opened]
Path(given["opened"]).write_text(json.dumps(seen))
"""
HARMLESS = {"/dev/null", "/dev/tty"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random bytes, so that any window of it found elsewhere was copied from it."""
    directory = tmp_path_factory.mktemp("traces") / "plain"
    directory.mkdir()
    data = random.Random(99).randbytes(2 * (1 << LARGE_CHUNK_LOG2) + 4242)
    tensors = [("a.weight", "U8", (len(data),), data), ("b.weight", "U8", (4096,), data[:4096][::-1])]
    (directory / "model.safetensors").write_bytes(making.safetensors(tensors))
    (directory / "tokenizer.json").write_bytes(random.Random(98).randbytes(200_000))
    return directory


@pytest.fixture(scope="module")
def sealed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("traces") / "sealed"
    making.seal(plain, directory, log2_chunk=LARGE_CHUNK_LOG2)
    return directory


def secrets(sealed: Path) -> dict[str, str]:
    """Return the data key, every file key, and half of each, masked."""
    key = bytes(making.key("data"))
    package_id = bytes.fromhex(json.loads((sealed / "manifest.json").read_bytes())["package_id"])
    found = {"data key": masked(key), "half of the data key": masked(key[:16])}
    for file in sorted(sealed.glob("*.sealed")):
        file_key = derive(key, file.read_bytes()[8:24], b"file\0" + package_id)
        found[f"key of {file.name}"] = masked(file_key)
        found[f"half of the key of {file.name}"] = masked(file_key[16:])
    return found


def child(program: str, given: dict[str, object], *prefix: str) -> dict[str, object]:
    """Run `program` in its own process and return the last line it printed."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PREAMBLE + program],
        cwd=ROOT,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    shown: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return shown


@pytest.mark.parametrize("threads", [1, 2])
def test_no_key_is_left_in_memory_once_a_package_was_loaded(sealed: Path, threads: int) -> None:
    """Not the data key, not any file's; while it is open the file keys are there, so the scan can see."""
    looked_for = secrets(sealed)
    shown = child(OPEN, {"secrets": looked_for, "sealed": str(sealed), "threads": threads})
    assert shown["after"] == dict.fromkeys(looked_for, 0)
    during = shown["during"]
    assert isinstance(during, dict)
    assert during["data key"] == during["half of the data key"] == 0
    assert all(count > 0 for name, count in during.items() if name.startswith("key of"))


@pytest.mark.parametrize("place", ["tensor", "table of the last file"])
def test_no_key_is_left_in_memory_after_a_refusal(place: str, sealed: Path, tmp_path: Path) -> None:
    """While the refusal is being handled: exceptions hold frames, and frames hold what was in them."""
    shutil.copytree(sealed, tmp_path / "damaged")
    by_size = sorted((tmp_path / "damaged").glob("*.sealed"), key=lambda file: file.stat().st_size)
    file = by_size[-1] if place == "tensor" else by_size[0]  # the tokenizer comes after the model
    raw = bytearray(file.read_bytes())
    index_end = 64 + 32 * int.from_bytes(raw[44:48], "little")
    raw[len(raw) // 2 if place == "tensor" else index_end] ^= 1
    file.write_bytes(raw)
    looked_for = secrets(sealed)
    for threads in (1, 2):
        given = {"secrets": looked_for, "sealed": str(tmp_path / "damaged"), "threads": threads}
        assert child(FAIL, given) == {"outcome": "chunk-wrong", "after": dict.fromkeys(looked_for, 0)}


def test_sealing_leaves_no_key_in_memory(plain: Path, tmp_path: Path) -> None:
    """The data key is the caller's, who wipes it; the ids that file keys follow from are new each time."""
    looked_for = {"data key": masked(making.key("data"))}
    given = {"secrets": looked_for, "plain": str(plain), "sealed": str(tmp_path / "sealed"), "threads": 2}
    assert child(SEAL, given) == {"after": {"data key": 0}}


def windows(directory: Path) -> set[bytes]:
    """Return what lies in plain files at every WINDOW_BYTES: any 127 bytes copied from one hold a window."""
    found = set()
    for content in making.plain(directory).values():
        found.update(
            content[place : place + WINDOW_BYTES] for place in range(0, len(content) - 63, WINDOW_BYTES)
        )
    return found


def holds_any(data: bytes, looked_for: set[bytes]) -> bool:
    """True when any window lies anywhere in `data`, whatever its offset."""
    heads = np.array(sorted({int.from_bytes(window[:8], "little") for window in looked_for}), np.uint64)
    for shift in range(8):
        count = (len(data) - shift) // 8
        words = np.frombuffer(data, np.uint64, count, shift) if count > 0 else heads[:0]
        for place in np.flatnonzero(np.isin(words, heads)) * 8 + shift:
            if data[place : place + WINDOW_BYTES] in looked_for:
                return True
    return False


def files_below(*directories: Path) -> Iterator[Path]:
    for directory in directories:
        yield from (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def test_the_search_finds_what_was_copied(plain: Path) -> None:
    looked_for = windows(plain)
    content = (plain / "model.safetensors").read_bytes()
    for shift in range(9):
        assert holds_any(b"x" * (770 + shift) + content[1001 : 1001 + 127] + b"y", looked_for)
    assert not holds_any(content[1001 : 1001 + 63], looked_for)
    assert not holds_any(random.Random(1).randbytes(5000), looked_for)


def traced(program: str, given: dict[str, object], folder: Path) -> tuple[list[str], bytes]:
    """Run `program`; return what it opened for writing, and the bytes it wrote beside stdout and stderr.

    By strace, which sees every system call of every thread. Where there is none, by Python's audit hook,
    which sees every file that Python opens; the bytes are then those of the files.
    """
    folder.mkdir()
    given = given | {"opened": str(folder / "opened")}
    if shutil.which("strace") is None:
        child(HOOK + program + HOOK_END, given)
        opened = json.loads((folder / "opened").read_text())
        found = [Path(path) for path in opened if Path(path).is_file()]
        return opened, b"".join(path.read_bytes() for path in found)
    calls = (
        "openat,open,creat,memfd_create,write,pwrite64,writev,pwritev,pwritev2,sendto,sendmsg,sendfile,splice"
    )
    log = folder / "calls"
    child(
        program, given, "strace", "-f", "-qq", "-xx", "-s", "2000000", "-e", f"trace={calls}", "-o", str(log)
    )
    opened, written = [], bytearray()
    for line in log.read_text().splitlines():
        call = line.split(maxsplit=1)[1]
        name = call.split("(")[0]
        text = bytes.fromhex("".join(re.findall(r"\\x([0-9a-f]{2})", call)))
        if name in {"openat", "open", "creat", "memfd_create"}:
            if name != "openat" or re.search(r"O_WRONLY|O_RDWR|O_CREAT", call):
                opened.append(text.decode())
        elif not re.match(r"\w+\((1|2),", call):
            assert name in {"write", "pwrite64"} or "resumed" in call, name
            written += text
    return opened, bytes(written)


def test_opening_writes_nothing_anywhere(plain: Path, sealed: Path, tmp_path: Path) -> None:
    """No file is opened for writing, none made in memory, no byte written but the child's own line."""
    given: dict[str, object] = {"secrets": secrets(sealed), "sealed": str(sealed), "threads": 2}
    opened, written = traced(OPEN, given, tmp_path / "trace")
    assert [path for path in opened if path not in HARMLESS] == []
    looked_for = windows(plain)
    assert not holds_any(written, looked_for)
    for path in files_below(tmp_path, Path("/dev/shm"), sealed):
        assert not holds_any(path.read_bytes(), looked_for), path.name


def test_sealing_writes_no_plain_byte(plain: Path, tmp_path: Path) -> None:
    """Only into the destination; of all bytes written, overwritten ones included, none was in the model."""
    destination = tmp_path / "sealed"
    given: dict[str, object] = {"secrets": {"data key": masked(making.key("data"))}, "plain": str(plain)}
    opened, written = traced(SEAL, given | {"sealed": str(destination), "threads": 2}, tmp_path / "trace")
    names = {Path(path).name for path in opened if path not in HARMLESS}
    allowed = {f"{path.name}.partial" for path in destination.iterdir()} | {"sealing.json.partial"}
    assert names - {path.name for path in destination.iterdir()} <= allowed
    looked_for = windows(plain)
    sealed_bytes = sum(path.stat().st_size for path in destination.iterdir())
    assert len(written) >= sealed_bytes > 2 << LARGE_CHUNK_LOG2  # what was written was seen
    assert not holds_any(written, looked_for)
    for path in files_below(tmp_path, Path("/dev/shm")):
        assert not holds_any(path.read_bytes(), looked_for), path.name


def test_both_audits_see_a_plain_byte_that_is_written(
    plain: Path, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is used elsewhere: strace where there is one, and Python's own hook."""
    leak = OPEN.replace(
        "tensor = None", f"Path({str(tmp_path / 'leak')!r}).write_bytes(held[0]); tensor = None"
    )
    given: dict[str, object] = {"secrets": secrets(sealed), "sealed": str(sealed), "threads": 1}
    for number in range(2):
        opened, written = traced(leak, given, tmp_path / f"trace {number}")
        assert str(tmp_path / "leak") in opened
        assert holds_any(written, windows(plain))
        monkeypatch.setattr(shutil, "which", lambda _: None)
