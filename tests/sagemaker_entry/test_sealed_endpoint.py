"""The whole endpoint over a sealed package: the same answers, nothing plain beside it, no key left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from container.model import belonging
from container.model.source import PARTS, WEIGHTS, WEIGHTS_DIGEST
from model_package import unlock
from model_package.recipients import Owner
from sagemaker_entry.supervisor import EXIT_KEY, EXIT_PACKAGE
from tests.model_package import making
from tests.model_package.test_traces import WINDOW_BYTES, holds_any
from tests.sagemaker_entry import sealed_model
from tests.sagemaker_entry.harness import wait_until
from tests.sagemaker_entry.sealed_model import Made, RealServer, copies, refused

DESCRIBE = {"Content-Type": "application/vnd.strongroom.describe+json"}
UNLOCK = {"Content-Type": "application/vnd.strongroom.unlock+json"}
CHAT = {"inputs": "hello", "parameters": {"max_new_tokens": 4, "do_sample": False}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return sealed_model.make(tmp_path_factory.mktemp("sealed"))


@pytest.fixture(scope="module")
def running(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with made.server(tmp_path_factory.mktemp("running")) as server:
        yield server
    assert server.process.returncode == 0, server.log


def weight_windows(made: Made) -> set[bytes]:
    """Return what lies in the plain weights at every WINDOW_BYTES, but what many files hold, like zeros."""
    found = set()
    for path in made.plain.rglob("*.safetensors"):
        content = path.read_bytes()
        each = (content[at : at + WINDOW_BYTES] for at in range(4096, len(content) - 63, WINDOW_BYTES))
        found.update(window for window in each if len(set(window)) > 24)
    assert len(found) > 1000
    return found


def test_a_sealed_endpoint_answers_as_the_plain_one_byte_for_byte(
    made: Made, running: RealServer, tmp_path: Path
) -> None:
    plain = {"STRONGROOM_MODEL": str(made.plain), "STRONGROOM_SERVED_NAME": "tiny"}
    with RealServer(tmp_path, **plain) as other:
        expected = other.answers()
        assert other.request("GET", "/ping")[1]["Strongroom-Seal"] == "plaintext"
        assert other.metric("strongroom_package_sealed") == 0
        assert other.events("plaintext_allowed")
    assert running.answers() == expected
    assert len(set(expected)) == len(expected), "answers that are all the same show nothing"


def test_ping_and_metrics_say_that_the_model_is_sealed(running: RealServer) -> None:
    status, headers, body = running.request("GET", "/ping")
    assert (status, body) == (200, b"")
    assert headers["Strongroom-Seal"] == "sealed"
    assert running.metric("strongroom_package_sealed") == 1
    assert not running.events("plaintext_allowed")


def test_the_start_was_ready_and_said_how_fast_it_opened(running: RealServer) -> None:
    assert "made ready beforehand" in running.log
    assert re.search(r"engine opened the package: \d+ MiB in \d+\.\d+ s, \d+\.\d+ GB/s", running.log)
    engine = next(p for p in running.processes() if b"sealed.rank" in Path(f"/proc/{p}/cmdline").read_bytes())
    maps = Path(f"/proc/{engine}/maps").read_text()
    assert "libtorch" not in maps, "a ready start imports no torch"
    assert ".sealed" not in maps and ".safetensors" not in maps


def test_no_key_is_left_in_any_process_once_the_endpoint_serves(made: Made, running: RealServer) -> None:
    running.answers()
    processes = running.processes()
    assert len(processes) >= 4
    assert sum(copies(pid, [b"STRONGROOM_SERVED_NAME"]) for pid in processes) > 0, "the scan sees nothing"
    assert [copies(pid, made.secrets) for pid in processes] == [0] * len(processes)


def test_no_plain_weight_is_written_anywhere_while_it_loads(made: Made, tmp_path: Path) -> None:
    """No file, no shared memory, no descriptor of any process; with strace, no byte on its way to one."""
    looked_for = weight_windows(made)
    home = tmp_path / "home"
    home.mkdir()
    server = made.server(tmp_path / "server", HOME=str(home), TMPDIR=str(home))
    calls = tmp_path / "calls"
    if shutil.which("strace"):
        server.launcher, server._arguments = "tests.sagemaker_entry.traced", [str(calls)]
    with server:
        server.answers()
        for pid in server.processes():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if "memfd" in os.readlink(link):
                    assert not holds_any(link.read_bytes(), looked_for), (pid, os.readlink(link))
        places = [*home.rglob("*"), *(tmp_path / "server").rglob("*"), *Path("/dev/shm").rglob("*")]
        for path in places:
            if path.is_file():
                assert not holds_any(path.read_bytes(), looked_for), path.name
    for path in made.package.iterdir():
        assert not holds_any(path.read_bytes(), looked_for), path.name
    if calls.exists():
        written = bytes.fromhex("".join(re.findall(r"\\x([0-9a-f]{2})", calls.read_text())))
        assert b"child_started" in written and b"<|im_start|>" in written, "strace saw nothing"
        assert not holds_any(written, looked_for)


def test_a_plain_weight_that_is_written_would_be_seen(made: Made) -> None:
    content = (made.plain / "model.safetensors").read_bytes()
    middle = len(content) // 2
    assert holds_any(b"x" * 77 + content[middle : middle + 3 * WINDOW_BYTES], weight_windows(made))


def test_a_plain_model_is_refused_by_an_endpoint_that_serves_sealed_ones(made: Made, tmp_path: Path) -> None:
    said = refused(made.server(tmp_path, STRONGROOM_MODEL=str(made.plain)), EXIT_PACKAGE)
    assert "package_refused: the model is not sealed" in said


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_plain_files_beside_a_broken_package_are_no_way_back(made: Made, tmp_path: Path, name: str) -> None:
    package = tmp_path / "package"
    shutil.copytree(made.package, package)
    (package / name).unlink()
    shutil.copytree(made.plain, package, dirs_exist_ok=True)
    said = refused(made.server(tmp_path / "server", STRONGROOM_MODEL=str(package)), EXIT_PACKAGE)
    assert "package_refused: the model is not sealed" in said


def test_another_key_is_refused(made: Made, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(making.key("other")))
    key.chmod(0o400)
    said = refused(made.server(tmp_path / "server", STRONGROOM_KEY=f"file:{key}"), EXIT_KEY)
    assert "key_refused: the key is not this package's" in said


def test_another_signer_is_refused(made: Made, tmp_path: Path) -> None:
    other = sealed_model.root("somebody")
    said = refused(made.server(tmp_path, STRONGROOM_VENDOR_ROOTS=other), EXIT_PACKAGE)
    assert "package_refused: the package is signed by a key that is not trusted" in said


def test_an_older_epoch_is_refused(made: Made, tmp_path: Path) -> None:
    said = refused(made.server(tmp_path, STRONGROOM_MIN_EPOCH="6"), EXIT_PACKAGE)
    assert "package_refused: the package was replaced by a newer one" in said


@pytest.mark.parametrize(
    ("name", "verify"),
    [("parts/ready-int8-block/decoder.safetensors", "read"), ("model.safetensors", "full")],
)
def test_a_turned_bit_in_the_weights_is_refused(made: Made, tmp_path: Path, name: str, verify: str) -> None:
    """In what this start reads; and with `full` in what it does not read, too."""
    package = made.flipped(tmp_path / "package", name)
    server = made.server(tmp_path / "server", STRONGROOM_MODEL=package, STRONGROOM_VERIFY=verify)
    assert "package_refused: corrupted or tampered with" in refused(server, EXIT_PACKAGE)


def test_a_customers_own_package_needs_the_customers_root(made: Made, tmp_path: Path) -> None:
    package = tmp_path / "package"
    sealed_model.seal(made.plain, package, Owner.CUSTOMER)
    mine = made.environment | {"STRONGROOM_MODEL": str(package)}
    said = refused(RealServer(tmp_path / "a", **mine), EXIT_PACKAGE)
    assert "package_refused: the package is signed by a key that is not trusted" in said
    mine["STRONGROOM_CUSTOMER_ROOTS"] = sealed_model.root("customer")
    del mine["STRONGROOM_VENDOR_ROOTS"]
    with RealServer(tmp_path / "b", **mine) as server:
        assert server.answers()


def test_a_package_without_its_unquantized_weights_answers_as_the_whole_one(
    made: Made, running: RealServer, tmp_path: Path
) -> None:
    """As `package build --without-weights` makes it: parts, and the digest of what they were made from."""
    lean = tmp_path / "lean"
    shutil.copytree(made.plain, lean)
    (lean / WEIGHTS_DIGEST).write_text(belonging.check(made.plain, [lean / PARTS]))
    (lean / WEIGHTS).unlink()
    sealed_model.seal(lean, tmp_path / "package")
    with made.server(tmp_path / "server", STRONGROOM_MODEL=str(tmp_path / "package")) as server:
        assert server.answers() == running.answers()


def test_a_key_that_is_given_once_serves_a_restarted_engine(made: Made, tmp_path: Path) -> None:
    """`?unlink` takes the file away; PID 1 keeps the key in a page, and hands that on."""
    key = tmp_path / "key"
    key.write_bytes(bytes(making.key("data")))
    key.chmod(0o600)
    with made.server(tmp_path / "server", STRONGROOM_KEY=f"file:{key}?unlink") as server:
        assert not key.exists()
        before = server.answers()
        kill_engine(server)
        assert server.answers() == before
        assert copies(server.process.pid, [bytes(making.key("data"))]) == 0


def kill_engine(server: RealServer) -> None:
    starts = server.metric("strongroom_engine_starts_total")
    is_rank = (p for p in server.processes() if b"sealed.rank" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(next(is_rank), signal.SIGKILL)
    wait_until(lambda: server.metric("strongroom_engine_starts_total") > starts, 100, "another engine")
    server.wait_ready(100)


def test_a_locked_endpoint_waits_for_its_key_takes_the_right_one_once_and_serves(
    made: Made, tmp_path: Path
) -> None:
    server = made.server(tmp_path, STRONGROOM_KEY="invocation:")
    server.start()
    try:
        wait_until(lambda: server.ping() == 200, 100, "a locked endpoint that the platform sends calls to")
        assert server.request("GET", "/ping")[1]["Strongroom-Seal"] == "locked"
        status, reply = server.invoke(CHAT)
        assert status == 503 and "locked" in json.dumps(reply)

        def described() -> bytes:
            status, _, body = server.request("POST", "/invocations", b"{}", DESCRIBE)
            assert status == 200, body
            return body

        def unlocked(message: bytes) -> tuple[int, str]:
            status, _, body = server.request("POST", "/invocations", message, UNLOCK)
            return status, body.decode()

        image = frozenset({unlock.read_description(described()).image_version})
        wrong = unlock.seal(described(), made.manifest, making.key("other"), image)
        status, said = unlocked(wrong)
        assert status == 403 and "key-wrong" in said
        status, said = unlocked(b"x" * 5000)
        assert status == 403 and "unlock-malformed" in said
        assert server.request("GET", "/ping")[1]["Strongroom-Seal"] == "locked"
        right = unlock.seal(described(), made.manifest, making.key("data"), image)
        assert unlocked(right) == (200, '{"status":"unlocked"}')
        sealed = lambda: server.request("GET", "/ping")[1]["Strongroom-Seal"] == "sealed"  # noqa: E731
        wait_until(sealed, 100, "the load")
        before = server.answers()
        assert unlocked(right)[0] == 409
        kill_engine(server)  # the key is kept for it
        assert server.answers() == before
        assert [copies(pid, [bytes(making.key("data"))]) for pid in server.processes()] == [0] * len(
            server.processes()
        )
    finally:
        server.stop()
