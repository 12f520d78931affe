"""Serving on a Unix socket: who may connect, what is in its place before and after, and no port at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagemaker_entry import listening, worker
from sagemaker_entry.listening import Listener, ListenRefused, listen
from sagemaker_entry.settings import Settings
from tests.sagemaker_entry.harness import ROOT, Server, post, read_all, status_of, wait_until

HELLO = {"inputs": "hello ", "parameters": {"max_new_tokens": 4}}
STRANGER = 4711


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "http.sock"


def on(path: Path, **changed: str) -> Settings:
    return Settings(listen=f"unix:{path}", **changed)  # type: ignore[arg-type]


@pytest.fixture
def opened(place: Path) -> Iterator[Listener]:
    listener = listen(on(place))
    yield listener
    if listener.socket.fileno() >= 0:
        listener.close()


def stale(path: Path) -> None:
    """Leave a socket behind as a server does that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))


def inet_sockets(pid: int) -> list[str]:
    """Return the TCP and UDP sockets among a process's descriptors."""
    rows = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            rows[f"socket:[{row.split()[9]}]"] = name
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except FileNotFoundError:
            continue  # closed meanwhile
    return [rows[link] for link in links if link in rows]


def test_a_whole_server_serves_on_a_socket_locked_and_opens_no_port(tmp_path: Path, place: Path) -> None:
    with Server(tmp_path, unix=place, STRONGROOM_WORKERS="2") as server:
        assert server.events("listening")[0]["path"] == str(place)
        status, headers, _ = server.request("GET", "/ping")
        assert (status, headers["Strongroom-Lockdown"]) == (200, "on")
        assert server.invoke(HELLO) == (200, [{"generated_text": "hello hell"}])
        stream = server.raw(post("/invocations", json.dumps({**HELLO, "stream": True}).encode()))
        assert stream.endswith(b"0\r\n\r\n") and b"generated_text" in stream
        wait_until(lambda: len(server.events("text_model_loaded")) == 2, 20, "both workers")
        pids = [server.process.pid, *(event["child_pid"] for event in server.events("child_started"))]
        pids += [event["pid"] for event in server.events("worker_started")]
        assert len(pids) == 5
        assert {pid: inet_sockets(pid) for pid in pids} == {pid: [] for pid in pids}
        assert stat.S_IMODE(place.stat().st_mode) == 0o660
        assert server.stop() == 0
    assert not place.exists()


def test_the_same_count_sees_a_port_where_there_is_one(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_WORKERS="1") as server:
        assert inet_sockets(server.process.pid) == ["tcp"]


def test_a_front_that_dies_or_drains_leaves_the_socket_in_its_place(tmp_path: Path, place: Path) -> None:
    with Server(tmp_path, unix=place, STRONGROOM_WORKERS="1") as server:
        made = place.stat().st_ino
        front = next(e["child_pid"] for e in server.events("child_started") if e["child"] == "front")
        os.kill(front, signal.SIGTERM)  # it ends in order, as gunicorn does
        wait_until(lambda: len(server.events("child_started")) == 3, 20, "another front")
        server.wait_ready()
        assert place.stat().st_ino == made
        slow = {"inputs": "ab wait=50 ", "parameters": {"max_new_tokens": 40}}
        client = server.connect()
        client.sendall(post("/invocations", json.dumps(slow).encode()))
        wait_until(lambda: server.engine["running"] == 1, what="a running request")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.ping() == 503, 1, "a refusal instead of nothing")
        assert place.exists()
        assert status_of(read_all(client)) == 200
        client.close()
        assert server.process.wait(10) == 0
    assert not place.exists()


def test_a_client_that_leaves_a_socket_frees_its_place(tmp_path: Path, place: Path) -> None:
    with Server(tmp_path, unix=place, STRONGROOM_WORKERS="1") as server:
        client = server.connect()
        body = {"inputs": "ab wait=50 ", "parameters": {"max_new_tokens": 2000}}
        client.sendall(post("/invocations", json.dumps(body).encode()))
        wait_until(lambda: server.engine["running"] == 1, what="a running request")
        client.close()
        wait_until(lambda: server.engine["running"] == 0, 2, "the end of it")


def test_headers_of_a_proxy_are_not_believed_because_the_caller_is_on_a_socket(
    monkeypatch: pytest.MonkeyPatch, place: Path, opened: Listener
) -> None:
    seen = []

    class Kept:
        def __init__(self, _: object, client: object, address: object, name: object) -> None:
            seen.append((address, name))

        def serve(self) -> None:
            """Nothing to serve."""

    class Idle:
        connections: dict[object, None] = {}  # noqa: RUF012  one test's
        connection_cap = 8
        metrics = type("Metrics", (), {"add": lambda *_: None})()

    monkeypatch.setattr(worker, "Connection", Kept)
    worker.Worker.handle(Idle(), opened.socket, object(), "")  # type: ignore[arg-type]
    # gunicorn takes whoever has no (host, port) for a trusted proxy
    assert seen == [(("", 0), ("localhost", 80))]


@pytest.mark.parametrize("mode", ["0600", "0660", "0666"])
def test_the_socket_has_its_mode_from_its_first_moment(
    monkeypatch: pytest.MonkeyPatch, place: Path, mode: str
) -> None:
    seen = []
    real = socket.socket.listen

    def look(self: socket.socket, backlog: int) -> None:
        seen.append(stat.S_IMODE(place.stat().st_mode))
        real(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", look)
    mask = os.umask(0o077)
    try:
        listener = listen(on(place, socket_mode=mode))
        assert os.umask(mask) == 0o077, "the process's own mask is another one now"
    finally:
        os.umask(mask)
    listener.close()
    assert seen == [int(mode, 8)]


@pytest.mark.parametrize(("mode", "allowed"), [("0660", False), ("0666", True)])
def test_another_user_gets_in_only_where_the_mode_says_so(tmp_path: Path, mode: str, allowed: bool) -> None:
    tmp_path.chmod(0o711)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o711)
    path = tmp_path / "http.sock"
    listener = listen(on(path, socket_mode=mode))
    program = (
        f"import os, socket, sys\nos.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "try:\n    client.connect(sys.argv[1])\nexcept PermissionError:\n    sys.exit(13)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd="/", check=False)
    listener.close()
    assert done.returncode == (0 if allowed else 13)


def test_a_socket_that_a_killed_server_left_is_replaced(place: Path) -> None:
    stale(place)
    listener = listen(on(place))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(place))
    listener.close()


def test_a_socket_that_is_served_is_left_to_its_server(place: Path, opened: Listener) -> None:
    before = place.stat().st_ino
    for name in (place, place.with_name("other.sock")):  # a directory is one server's
        with pytest.raises(ListenRefused, match="another server has"):
            listen(on(name))
    assert place.stat().st_ino == before


def test_a_socket_of_other_software_that_serves_is_left_alone(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(place))
        other.listen()
        with pytest.raises(ListenRefused, match="somebody listens on"):
            listen(on(place))
        assert place.exists()


def test_a_dead_socket_is_replaced_where_a_profile_forbids_to_connect(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    stale(place)
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EPERM)
    listener = listen(on(place))
    monkeypatch.undo()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(place))
    listener.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_never_removed(place: Path, kind: str) -> None:
    if kind == "file":
        place.write_text("kept")
    elif kind == "folder":
        place.mkdir()
    else:
        target = place.with_name("target")
        stale(target)
        place.symlink_to(target)
    with pytest.raises(ListenRefused, match="is no socket"):
        listen(on(place))
    assert place.lstat()


def test_a_directory_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ListenRefused, match="no such file or directory") as refused:
        listen(on(tmp_path / "gone" / "http.sock"))
    assert "must be there, readable and writable" in refused.value.hint


def test_of_two_servers_that_start_at_once_one_is_refused(place: Path) -> None:
    stale(place)
    outcomes: list[Listener | ListenRefused] = []

    def start() -> None:
        try:
            outcomes.append(listen(on(place)))
        except ListenRefused as refused:
            outcomes.append(refused)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listeners = [outcome for outcome in outcomes if isinstance(outcome, Listener)]
    for listener in listeners:
        listener.close()
    assert (len(listeners), len(outcomes)) == (1, 8)


def test_at_its_end_a_server_removes_its_own_socket_and_no_other(place: Path, opened: Listener) -> None:
    place.unlink()
    stale(place)
    opened.close()
    assert place.exists(), "the socket of another server was removed"


def test_a_server_whose_socket_somebody_removed_ends_all_the_same(place: Path) -> None:
    listener = listen(on(place))
    place.unlink()
    listener.close()
    again = listen(on(place))  # the directory is free
    again.close()
    assert not place.exists()


def test_a_start_that_fails_after_listening_leaves_no_socket(tmp_path: Path, place: Path) -> None:
    program = (
        "def fails(*_, **__):\n    raise LockdownFailed('not refused: connect')\n"
        "from container.ranks.lockdown import LockdownFailed\n"
        "import os, sys\nfrom sagemaker_entry import supervisor, settings\nsupervisor.hold = fails\n"
        "chosen, _ = settings.read(os.environ)\n"
        "sys.exit(supervisor.Supervisor(chosen, supervisor.Commands(), os.environ).run())\n"
    )
    environment = {
        "STRONGROOM_LISTEN": f"unix:{place}",
        "STRONGROOM_MODEL": str(tmp_path),
        "STRONGROOM_ALLOW_PLAINTEXT": "on",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert b"lockdown_failed" in done.stderr
    assert not place.exists()


def test_a_place_that_cannot_be_had_stops_the_start_in_two_lines(place: Path) -> None:
    place.write_text("a file")
    environment = {"STRONGROOM_LISTEN": f"unix:{place}", "STRONGROOM_ALLOW_PLAINTEXT": "on"}
    done = subprocess.run(
        [sys.executable, "-m", "sagemaker_entry", "serve"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: `{place}` is there and is no socket\nhint: remove it, or choose another path\n"
    )


def test_a_port_that_is_taken_is_named_with_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenRefused, match=f"port {port}: address already in use") as refused:
            listen(Settings(host="127.0.0.1", port=port))
    assert refused.value.hint == "set `STRONGROOM_PORT`"
    assert listening.BACKLOG > 0
