"""The image behind its two ways in: what docker is told, what is left afterwards, what the demo judges."""

from __future__ import annotations

import contextlib
import http.server
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.image import container, serving
from infra.image.container import Process
from infra.image.docker import DockerFailed
from infra.image.serving import NeverHealthy, Serving, Way
from scripts import demo, demo_image


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Strongroom-Lockdown", "on")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing to say."""

    def address_string(self) -> str:
        return "somebody"


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class FakeContainer:
    """Stands in for a container: listens where its flags say, inside what is mounted."""

    made: list[FakeContainer] = []  # noqa: RUF012  cleared by the fixture
    starts = True
    more = ""  # rows of further listeners

    def __init__(self, image: str, model: Path, **told: Any) -> None:
        self.name, self.image, self.model, self.told = "c1", image, model, told
        self.state = {"Running": self.starts, "Pid": 1}
        self._stack = contextlib.ExitStack()
        self.made.append(self)

    def __enter__(self) -> FakeContainer:
        if not self.starts:
            return self
        flags = self.told["flags"]
        if "STRONGROOM_LISTEN" in self.told["environment"]:
            folder = flags[flags.index("--volume") + 1].split(":")[0]
            server: socketserver.BaseServer = UnixServer(f"{folder}/http.sock", Answers)
        else:
            server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers)
            serving_port.append(server.server_address[1])  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self._stack.callback(server.server_close)
        self._stack.callback(thread.join)
        self._stack.callback(server.shutdown)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def log(self) -> str:
        return '{"event":"engine_cannot_start"}'

    def network(self, name: str) -> str:
        tcp = "head\n 0: 00000000:1F90 00000000:0000 0A\n 1: 0B00007F:9C41 00000000:0000 0A\n"
        rows = {"tcp": tcp + self.more, "tcp6": "head\n"}
        return rows[name]

    def processes(self) -> tuple[Process, ...]:
        return tuple(Process(pid, {"Uid": "10001\t10001"}, True, "0") for pid in (1, 2))


serving_port: list[int] = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """Return what docker was told; it makes nothing."""
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(serving, "Container", FakeContainer)
    monkeypatch.setattr(serving, "docker", lambda *words: told.append(words) or "")
    monkeypatch.setattr(serving, "run", lambda *words: told.append(words))

    def inspect(*_: str) -> dict[str, Any]:
        network = told[0][-1]
        monkeypatch.setattr(serving, "PORT", serving_port[-1])
        return {"NetworkSettings": {"Networks": {network: {"IPAddress": "127.0.0.1"}}}}

    monkeypatch.setattr(serving, "inspect", inspect)
    FakeContainer.made.clear()
    serving_port.clear()
    yield told
    FakeContainer.starts = True


def test_over_a_socket_the_container_has_no_network_and_the_folder_is_ours(
    calls: list[tuple[str, ...]],
) -> None:
    with Serving("image", Path("/model"), Way.SOCKET) as served:
        told = FakeContainer.made[0].told
        flags = " ".join(told["flags"])
        assert "--network none" in flags and "--cap-drop ALL" in flags and "--read-only" in flags
        assert "--cap-add" not in flags
        assert told["environment"]["STRONGROOM_LISTEN"] == "unix:/run/strongroom/http.sock"
        path = Path(served.upstream.removeprefix("unix:"))
        assert path.is_socket()
        assert path.parent.parent.stat().st_mode & 0o777 == 0o700, "others could reach the socket"
        assert served.get("/ping") == (200, served.get("/ping")[1])
        assert served.get("/ping")[1]["Strongroom-Lockdown"] == "on"
        assert served.users() == [10001]
    assert not path.parent.parent.exists()
    assert calls == []


def test_over_a_network_it_is_one_without_a_way_out_and_it_is_gone_afterwards(
    calls: list[tuple[str, ...]],
) -> None:
    with Serving("image", Path("/model"), Way.INTERNAL, "0") as served:
        network = calls[0][-1]
        assert calls == [("network", "create", "--internal", network)]
        flags = " ".join(FakeContainer.made[0].told["flags"])
        assert f"--network {network}" in flags and "--publish" not in flags
        assert flags.count("--cap-add") == 2, "root needs two rights to become somebody else"
        assert served.get("/ping")[0] == 200
        assert served.ports() == 1, "docker's own resolver counts"
        FakeContainer.made[0].more = " 2: 0100007F:0016 00000000:0000 0A\n"
        assert served.ports() == 2
    assert calls[-1] == ("network", "rm", network)


@pytest.mark.parametrize("way", Way)
def test_a_container_that_never_answers_leaves_nothing_behind(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    FakeContainer.starts = False
    serving_port.append(1)
    with pytest.raises(NeverHealthy, match="engine_cannot_start"), Serving("image", Path("/model"), way):
        pytest.fail("it was called healthy")
    if way is Way.INTERNAL:
        assert calls[-1][:2] == ("network", "rm")


def test_a_network_that_cannot_be_made_starts_nothing(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: str) -> str:
        raise DockerFailed("no", "hint")

    monkeypatch.setattr(serving, "docker", fails)
    with pytest.raises(DockerFailed), Serving("image", Path("/model"), Way.INTERNAL):
        pytest.fail("it went on")
    assert FakeContainer.made == []


RIGHT = {"lockdown": "on", "seal": "sealed", "ports": 0, "users": [10001], "changed_files": [], "exit": 0}


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, []),
        ({"lockdown": "off"}, ["lockdown"]),
        ({"lockdown": None}, ["lockdown"]),
        ({"seal": "plaintext"}, ["seal"]),
        ({"ports": 1}, ["ports"]),
        ({"users": [0]}, ["users"]),
        ({"users": [0, 10001]}, ["users"]),
        ({"changed_files": ["A /tmp/x"]}, ["changed_files"]),
        ({"exit": 137}, ["exit"]),
    ],
)
def test_each_thing_that_is_not_as_it_must_be_is_named(changed: dict[str, Any], wrong: list[str]) -> None:
    assert demo_image.wrong(RIGHT | changed, Way.SOCKET, 10001, sealed=True) == wrong


def test_a_port_is_right_on_a_network_and_wrong_on_a_socket() -> None:
    assert demo_image.wrong(RIGHT | {"ports": 1}, Way.INTERNAL, 10001, sealed=True) == []
    assert demo_image.wrong(RIGHT, Way.INTERNAL, 10001, sealed=True) == ["ports"]


def test_a_plain_model_in_the_demo_is_one_that_was_asked_for() -> None:
    assert demo_image.wrong(RIGHT | {"seal": "plaintext"}, Way.SOCKET, 10001, sealed=False) == []
    assert demo_image.wrong(RIGHT, Way.SOCKET, 10001, sealed=False) == ["seal"]


def test_the_key_in_the_container_is_a_copy_for_its_user_alone_and_goes(tmp_path: Path) -> None:
    kept = tmp_path / "key"
    kept.write_text("k")
    kept.chmod(0o600)
    model = demo_image.Model(tmp_path, kept, {"STRONGROOM_VENDOR_ROOTS": "ed25519:00"})
    with demo_image.key_of(model, os.getuid()) as (mounts, environment):
        copy = Path(mounts[0].split(":")[0])
        assert mounts == [f"{copy}:/run/secrets/key:ro"]
        assert copy.read_text() == "k" and copy.stat().st_mode & 0o777 == 0o400
        assert copy.stat().st_uid == os.getuid()
    assert environment["STRONGROOM_KEY"] == "file:/run/secrets/key"
    assert environment["STRONGROOM_VENDOR_ROOTS"] == "ed25519:00"
    assert not copy.exists()


GIVEN = {"reply": "Paris.", "time_to_first_token_s": 0.1, "last_part_s": 1.0}


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({3: {"reply": "Paris!"}}, False),
        ({3: {"wrong": ["ports"]}}, False),
        ({3: {"last_part_s": 0.1}}, False),
        ({number: {"reply": "London."} for number in range(6)}, False),
    ],
)
def test_the_demo_is_right_when_all_six_runs_are_and_answer_alike(
    monkeypatch: pytest.MonkeyPatch, changes: dict[int, dict[str, Any]], ok: bool
) -> None:
    seen: list[tuple[Way, str, str | None, int]] = []

    def one(
        _: str, __: demo_image.Model, way: Way, kind: str, user: str | None, expected: int, ___: object
    ) -> Any:
        seen.append((way, kind, user, expected))
        return GIVEN | {"wrong": []} | changes.get(len(seen) - 1, {})

    monkeypatch.setattr(demo_image, "one", one)
    result, report = demo_image.in_the_image(
        demo_image.Model(Path("/model")), "image:1", lambda _: {}, demo.sound
    )
    assert result is ok
    assert len(report["runs"]) == 6 and report["image"] == "image:1"
    assert {(way, kind) for way, kind, _, _ in seen} == {
        (way, kind) for way in Way for kind in ("its own user", "a random user", "root")
    }
    for _, kind, user, expected in seen:
        if kind == "a random user":
            assert user == f"{expected}:{expected}" and expected >= 20_000
        else:
            assert (user, expected) == (None if kind == "its own user" else "0", 10001)


def test_what_docker_makes_for_a_mount_is_no_change_and_what_is_beside_it_is(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Serving("image", Path("/model"), Way.SOCKET) as served:
        mounts = {"Mounts": [{"Destination": "/run/secrets/key"}]}
        monkeypatch.setattr(serving, "inspect", lambda *_: mounts)
        said = "C /run\nA /run/secrets\nA /run/secrets/key\nA /run/secrets/other\nA /tmp/x\n"
        monkeypatch.setattr(serving, "docker", lambda *_: said)
        assert served.changes() == ["A /run/secrets/other", "A /tmp/x"]


def test_patience_does_not_count_a_machine_that_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("infra.image.container.time.monotonic", lambda: now_s[0])
    patience = container.Patience(20.0)
    now_s[0] = 500.0
    assert not patience.over()
    for _ in range(14):
        now_s[0] += 1.0
        assert not patience.over()
    now_s[0] += 1.0
    assert patience.over()
