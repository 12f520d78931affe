"""Starting: users, children under them, and what can never serve ends with one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from container.text.errors import TextCode, TextError
from sagemaker_entry import __main__ as entry
from sagemaker_entry import children, front, supervisor, wiring
from sagemaker_entry.supervisor import SERVICE_ID, drop_privileges
from tests.sagemaker_entry.harness import ROOT, Server, write_model
from tests.sagemaker_entry.test_supervisor import run_entry


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Record what would be changed of this process's user, and change nothing."""
    made: list[tuple[str, object]] = []
    for name in ("setgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda value, name=name: made.append((name, value)))
    return made


@pytest.mark.parametrize(
    ("pid", "uid", "drops"), [(1, 0, True), (1, SERVICE_ID, False), (1, 1000, False), (77, 0, False)]
)
def test_only_root_as_pid_1_gives_its_rights_up(
    monkeypatch: pytest.MonkeyPatch, changes: list[tuple[str, object]], pid: int, uid: int, drops: bool
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(os, "getuid", lambda: uid)
    drop_privileges()
    # groups and group first: without root's user id neither could be given up
    expected = [("setgroups", []), ("setgid", SERVICE_ID), ("setuid", SERVICE_ID)]
    assert changes == (expected if drops else [])


def test_root_gives_its_rights_up_before_it_reads_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(supervisor, "drop_privileges", lambda: done.append("dropped"))
    monkeypatch.setattr(entry.settings, "read", lambda _: pytest.fail("too early") if not done else stop())

    def stop() -> None:
        done.append("read")
        raise entry.settings.SettingsError("enough", "of this")

    mask = os.umask(0o022)
    try:
        assert entry.main(["serve"]) == 2
        assert os.umask(mask) == 0o077, "what it writes would be readable by others"
    finally:
        os.umask(mask)
    assert done == ["dropped", "read"]


def test_a_root_that_may_not_change_its_user_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(os, "setgroups", refuse)
    assert entry.main(["serve"]) == 2
    assert "`--user 10001`" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "same"), [(["-I", "-B", "-X", "utf8"], True), ([], False)])
def test_children_are_isolated_where_their_parent_is(flags: list[str], same: bool) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = []\n"
        "from container.ranks import followers\n"
        "from sagemaker_entry.supervisor import engine_command, front_command\n"
        "for command in (followers.COMMAND, engine_command(3, 4, 5), front_command(3, 4, 5, 6, 7)):\n"
        "    print(*command[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, *flags, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("-I -B -X utf8 -m ") is same for line in lines)


def spawned(lines: str) -> subprocess.CompletedProcess[str]:
    """Run `lines` in a process of its own; as root it first becomes the service's user."""
    script = (
        "import os\nfrom sagemaker_entry import children\nfrom pathlib import Path\n"
        f"if os.getuid() == 0:\n    os.setgroups([]); os.setgid({SERVICE_ID}); os.setuid({SERVICE_ID})\n"
        + textwrap.dedent(lines)
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )


def test_a_child_offered_to_the_oom_killer_starts_under_the_services_own_user() -> None:
    result = spawned(
        """
        children.undumpable()
        pid = children.spawn(["/bin/cat", "/proc/self/oom_score_adj"], {}, [], 200)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        """
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == "200"


def test_a_child_starts_where_its_score_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    result = spawned(
        """
        def refuse(*_):
            raise PermissionError
        Path.write_text = refuse
        pid = children.spawn(["/bin/true"], {}, [], 200)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        """
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_process_that_made_itself_undumpable_hides_its_memory_and_its_environment() -> None:
    result = spawned(
        """
        children.undumpable()
        import resource
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        assert os.stat("/proc/self/environ").st_uid == 0
        """
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_training_is_refused_by_name_with_what_to_do_instead() -> None:
    result = run_entry("train")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: `train` is not part of this version",
        "hint: start the container with `serve`",
    ]


@pytest.mark.parametrize("arguments", [("serve", "now"), ("train", "x"), ("--help",), ("Serve",), ("",)])
def test_any_other_argument_is_refused_before_anything_starts(arguments: tuple[str, ...]) -> None:
    result = run_entry(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: one argument is expected")


class Waiting:
    """Stands for the service while its text model loads."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def ready(self, text: Any, defaults: Any) -> None:
        self.given.append(text)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(wiring.gevent, "sleep", made.append)
    return made


def failing(times: int, error: Exception) -> Callable[[dict[str, bytes]], Any]:
    left = [error] * times

    def load(_: dict[str, bytes]) -> str:
        if left:
            raise left.pop()
        return "the model"

    return load


@pytest.mark.parametrize(
    "error", [OSError("x"), ValueError("x"), TextError(TextCode.FILE_MALFORMED), KeyError("x"), MemoryError()]
)
def test_the_text_model_is_tried_a_few_times_and_then_the_worker_ends(
    tmp_path: Path, pauses: list[float], error: Exception
) -> None:
    service: Any = Waiting()
    wiring.load(service, dict, failing(wiring.ATTEMPTS - 1, error), lambda: False)
    assert service.given == ["the model"]
    assert pauses == [wiring.RETRY_S] * (wiring.ATTEMPTS - 1)
    pauses.clear()
    with pytest.raises(SystemExit) as caught:
        unready: Any = Waiting()
        wiring.load(unready, dict, failing(wiring.ATTEMPTS, error), lambda: False)
    assert caught.value.code == children.EXIT_UNUSABLE
    assert len(pauses) == wiring.ATTEMPTS - 1, "it slept after the last attempt"


def test_a_second_worker_that_cannot_load_while_the_front_halts_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(_: Any) -> None:
        try:
            raise HaltServer("App failed to load.", children.EXIT_UNUSABLE)
        except HaltServer:
            raise HaltServer("App failed to load.", children.EXIT_UNUSABLE)  # noqa: B904 - as gunicorn does

    monkeypatch.setattr(Arbiter, "__init__", lambda *_: None)
    monkeypatch.setattr(Arbiter, "run", run)
    application = object.__new__(front.Front)
    with pytest.raises(SystemExit) as caught:
        application.run()
    assert caught.value.code == children.EXIT_UNUSABLE
    assert caught.value.__suppress_context__, "Python would print the traces"


def broken_model(server: Server) -> None:
    tokenizer = server.directory / "model" / "tokenizer.json"
    tokenizer.write_text('{"secret": "' + "s3cr3t" * 10)


def test_a_text_model_that_cannot_load_ends_the_container_with_its_cause(tmp_path: Path) -> None:
    server = Server(tmp_path, STRONGROOM_WORKERS="2")
    broken_model(server)
    server.start()
    statuses = {server.ping()}
    assert server.process.wait(30) == supervisor.EXIT_BROKEN
    assert statuses <= {0, 503}
    attempts = server.events("text_model_failed")
    assert max(event["attempt"] for event in attempts) == wiring.ATTEMPTS
    assert {event["code"] for event in attempts} == {TextCode.FILE_MALFORMED.value}
    assert [event["code"] for event in server.events("front_cannot_start")] == [children.EXIT_UNUSABLE]
    assert "s3cr3t" not in server.log and "Traceback" not in server.log
    assert len(server.events("child_died")) == 1, "the front was started again"


def test_a_key_file_that_cannot_be_read_ends_the_container_instead_of_serving_without(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, kind in (("missing", "FileNotFoundError"), ("empty", "ValueError")):
        directory = tmp_path / f"with-{name}"
        directory.mkdir()
        path = str(tmp_path / name)
        server = Server(directory, STRONGROOM_API_KEY_FILE=path, STRONGROOM_WORKERS="1")
        server.start()
        assert server.process.wait(15) == supervisor.EXIT_BROKEN
        assert server.events("api_key_unreadable")[0]["kind"] == kind
        assert path not in server.log, "the log names a file of the operator's"


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"abc\n", "abc"),
        (b"  abc \r\nsecond\n", "abc"),
        (b"k\xc3\xa9y", "k\u00e9y"),
        (b"a" * 5000, "a" * 4096),
    ],
)
def test_the_key_is_the_first_line_of_its_file(tmp_path: Path, content: bytes, key: str) -> None:
    (tmp_path / "key").write_bytes(content)
    assert wiring.read_key(str(tmp_path / "key")) == key


def test_no_key_is_required_where_no_file_is_named() -> None:
    assert wiring.read_key(None) is None


def test_the_fingerprint_tells_models_and_configurations_apart(tmp_path: Path) -> None:
    from sagemaker_entry.settings import Settings

    one = Settings(model=str(write_model(tmp_path / "one")), allow_plaintext="on")
    same = wiring.fingerprint(one)
    assert wiring.fingerprint(one) == same
    assert same.startswith("fp_") and len(same) == 15
    (tmp_path / "one" / "config.json").write_text('{"eos_token_id": 2}')
    assert wiring.fingerprint(one) != same
    assert wiring.fingerprint(Settings(model=str(tmp_path / "nowhere"))).startswith("fp_")
    assert str(tmp_path) not in same
