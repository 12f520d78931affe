"""The command line: forms of output, exit codes, the emulator and the call as real processes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from infra import serving
from infra.cli import app, main
from infra.emulator import Emulator
from infra.report import CommandError, ExitCode
from tests.infra.scripted import ScriptedContainer, cut, reply, stream

ROOT = Path(__file__).resolve().parents[2]
CHAT = b'{"choices": [{"message": {"content": "Paris"}}]}'


def events(*texts: str) -> list[bytes]:
    chunks = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in texts]
    return [f"data: {chunk}\n\n".encode() for chunk in chunks] + [b"data: [DONE]\n\n"]


@dataclass
class Done:
    """How a command ended and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def strongroom(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line in this process, on a machine without AWS settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)

    def run(*arguments: str, **environment: str) -> Done:
        with monkeypatch.context() as here:
            for name, value in environment.items():
                here.setenv(name, value)
            here.setattr(sys, "argv", ["strongroom", *arguments])
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        captured = capfd.readouterr()
        return Done(int(code or 0), captured.out, captured.err)

    return run


def document(done: Done) -> dict[str, Any]:
    """Return the one JSON object on stdout."""
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    assert {"ok", "command", "version"} < loaded.keys()
    assert ("result" in loaded) is not ("error" in loaded)
    return loaded


@contextmanager
def emulating(container: ScriptedContainer, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "infra", "emulate", "--upstream", container.address, "--port", "0", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


@contextmanager
def emulator(container: ScriptedContainer) -> Iterator[str]:
    with Emulator(container.address, "strongroom", strict=True) as running:
        yield running.url


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_the_command_line_imports_in_half_a_second_and_without_any_sdk() -> None:
    code = (
        "import sys, infra.cli; print([n for n in ('boto3','botocore','torch','aws_cdk','sagemaker','flask')"
    )
    code += " if n in sys.modules], any(n.startswith(('container', 'sagemaker_entry')) for n in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "[] False", shown.stderr
    # Processor time, less that of a process that imports nothing: a busy machine changes neither.
    spent_s = cpu_s("import infra.cli") - cpu_s("pass")
    assert spent_s < 0.5


def cpu_s(code: str) -> float:
    timed = f"import time; {code}; print(time.process_time())"
    best = []
    for _ in range(3):
        shown = subprocess.run(
            [sys.executable, "-c", timed], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        best.append(float(shown.stdout))
    return min(best)


def test_the_emulator_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, infra.emulator; print({n.partition('.')[0] for n in sys.modules}"
    code += " - set(sys.stdlib_module_names) - {'infra', '__main__'})"
    shown = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.stdout.strip() == "set()", shown.stderr


def test_the_version_is_the_projects(strongroom: Run) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    done = strongroom("version")
    assert (done.returncode, done.stdout.strip()) == (0, project["version"])
    assert document(strongroom("version", "--json"))["result"]["version"] == project["version"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("emulate",),
        ("emulate", "--upstream", "nowhere"),
        ("emulate", "--upstream", "h:1", "--endpoint", "a_b"),
        ("emulate", "--upstream", "h:1", "--split", "lines"),
        ("invoke",),
        ("invoke", "--prompt", "x", "--body-file", "-"),
        ("token", "--expires", "43201"),
        ("serve", "--model", "/nonexistent"),
        ("serve", "--env", "novalue"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_2_and_says_so(strongroom: Run, arguments: tuple[str, ...]) -> None:
    plain = strongroom(*arguments)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr
    told = strongroom(*arguments, "--json")
    assert told.returncode == 2
    found = document(told)
    assert (found["ok"], found["command"]) == (False, arguments[0])
    assert found["error"]["message"]


def test_every_verb_has_the_json_option() -> None:
    verbs = [command.callback for command in app.registered_commands]
    assert len(verbs) == 6
    for verb in verbs:
        assert verb is not None
        assert "as_json" in verb.__annotations__, f"{verb.__name__} has no --json"


def test_emulate_prints_what_a_shell_needs_and_ends_on_sigterm() -> None:
    with ScriptedContainer(reply(CHAT)) as container, emulating(container, "--endpoint", "demo") as process:
        assert process.stdout is not None
        lines = [first_line(process) for _ in range(6)]
        shell = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        assert lines[0].startswith("export AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=http://127.0.0.1:")
        assert shell["OPENAI_BASE_URL"].endswith("/endpoints/demo/openai/v1")
        assert shell["OPENAI_API_KEY"].startswith("sagemaker-api-key-")
        runtime = boto3.client(
            "sagemaker-runtime",
            endpoint_url=shell["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"],
            aws_access_key_id=shell["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=shell["AWS_SECRET_ACCESS_KEY"],
            region_name=shell["AWS_DEFAULT_REGION"],
        )
        assert runtime.invoke_endpoint(EndpointName="demo", Body=b"{}")["Body"].read() == CHAT
        runtime.close()
        process.terminate()
        assert process.wait(timeout=10) == 0
        assert process.stdout.read() == ""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would every child of a test run started as one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_emulate_as_json_prints_one_object_and_ctrl_c_exits_with_130(interruptible: None) -> None:
    with ScriptedContainer(reply(CHAT)) as container, emulating(container, "--json", "--strict") as process:
        started = json.loads(first_line(process))
        assert started["ok"] is True
        assert started["result"]["url"].startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_a_taken_port_exits_with_3(strongroom: Run) -> None:
    with ScriptedContainer(reply(CHAT)) as container:
        port = container.address.rpartition(":")[2]
        done = strongroom("emulate", "--upstream", container.address, "--port", port, "--json")
    assert done.returncode == 3
    assert document(done)["error"]["kind"] == "port_taken"


def test_invoke_prints_the_answer_whole_and_streamed(strongroom: Run, tmp_path: Path) -> None:
    with ScriptedContainer(reply(CHAT)) as container, emulator(container) as url:
        plain = strongroom("invoke", "--endpoint-url", url, "--prompt", "capital?", "--max-tokens", "9")
        assert (plain.returncode, plain.stdout) == (0, "Paris\n"), plain.stderr
        asked = json.loads(container.requests[0].body)
        assert asked["messages"] == [{"role": "user", "content": "capital?"}]
        assert (asked["max_tokens"], asked["stream"]) == (9, False)
        found = document(
            strongroom("invoke", "--prompt", "x", "--json", AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=url)
        )
        assert found["result"]["text"] == "Paris"
        assert found["result"]["content_type"] == "application/json"

        container.script = stream(events("Pa", "ris", " ☂"), gap_s=0.02)
        plain = strongroom("invoke", "--endpoint-url", url, "--prompt", "x", "--stream")
        assert plain.stdout == "Paris ☂\n"
        body = tmp_path / "body.json"
        body.write_bytes(b"{}")
        told = strongroom("invoke", "--endpoint-url", url, "--body-file", str(body), "--stream", "--json")
        result = document(told)["result"]
        assert (result["text"], result["parts"]) == ("Paris ☂", 4)
        assert result["first_part_s"] < result["last_part_s"]
        assert container.requests[-1].body == b"{}"


def test_invoke_exits_with_4_when_refused_and_3_when_nobody_answers(strongroom: Run) -> None:
    with ScriptedContainer(reply(b"busy", 503)) as container, emulator(container) as url:
        done = strongroom("invoke", "--endpoint-url", url, "--prompt", "x", "--json")
        assert done.returncode == 4
        error = document(done)["error"]
        assert (error["kind"], error["hint"]) == ("ModelError", "the container answered 503")
        container.script = stream(events("Pa"), ending=cut)
        done = strongroom("invoke", "--endpoint-url", url, "--prompt", "x", "--stream", "--json")
        assert (done.returncode, document(done)["error"]["kind"]) == (4, "ModelStreamError")
    gone = strongroom("invoke", "--endpoint-url", url, "--prompt", "x", "--json")
    assert (gone.returncode, document(gone)["error"]["kind"]) == (3, "unreachable")


def test_invoke_without_region_or_keys_exits_with_3(strongroom: Run) -> None:
    done = strongroom("invoke", "--prompt", "x", "--json")
    assert (done.returncode, document(done)["error"]["kind"]) == (3, "no_region")
    done = strongroom("invoke", "--prompt", "x", "--region", "us-east-1", "--json")
    assert (done.returncode, document(done)["error"]["kind"]) == (3, "no_credentials")


def test_token_uses_the_callers_own_keys_or_the_local_ones(strongroom: Run) -> None:
    local = document(strongroom("token", "--local", "--expires", "60", "--json"))["result"]
    assert (local["expires_s"], local["region"]) == (60, "us-east-1")
    own = strongroom(
        "token", "--region", "eu-west-1", AWS_ACCESS_KEY_ID="AKOWN", AWS_SECRET_ACCESS_KEY="own-secret-word"
    )
    assert own.returncode == 0
    url = base64.b64decode(own.stdout.strip().removeprefix("sagemaker-api-key-")).decode()
    assert "X-Amz-Credential=AKOWN%2F" in url
    assert "own-secret-word" not in own.stdout + own.stderr + url
    assert strongroom("token", "--region", "eu-west-1").returncode == 3
    assert strongroom("token").returncode == 3


def test_the_server_gets_no_aws_variable_and_the_options_as_settings(tmp_path: Path) -> None:
    base = {"AWS_SECRET_ACCESS_KEY": "s", "PATH": "p", "HF_MODEL_ID": "/old", "SAGEMAKER_BIND_TO_PORT": "1"}
    chosen = serving.environment(base, tmp_path, 8123, ["STRONGROOM_WORKERS=1"])
    assert chosen == {
        "PATH": "p",
        "STRONGROOM_HOST": "127.0.0.1",
        "STRONGROOM_MODEL": str(tmp_path),
        "STRONGROOM_PORT": "8123",
        "STRONGROOM_WORKERS": "1",
    }
    kept = serving.environment({"SAGEMAKER_BIND_TO_PORT": "1", "STRONGROOM_HOST": "::"}, None, None, [])
    assert kept == {"SAGEMAKER_BIND_TO_PORT": "1", "STRONGROOM_HOST": "::"}
    with pytest.raises(CommandError) as caught:
        serving.environment({}, tmp_path / "gone", None, [])
    assert caught.value.code == ExitCode.USAGE


def test_a_server_on_a_socket_is_called_through_an_emulator_or_directly(
    strongroom: Run, tmp_path: Path
) -> None:
    path = tmp_path / "http.sock"
    with ScriptedContainer(reply(CHAT), path) as container, emulator(container) as url:
        assert container.address == f"unix:{path}"
        assert strongroom("invoke", "--endpoint-url", url, "--prompt", "x").stdout == "Paris\n"
        direct = strongroom("invoke", "--endpoint-url", container.address, "--prompt", "x")
        assert (direct.returncode, direct.stdout) == (0, "Paris\n"), direct.stderr
        assert [request.headers["host"] for request in container.requests] == ["localhost"] * 2
        container.script = stream(events("Pa", "ris"), gap_s=0.02)
        told = strongroom(
            "invoke", "--endpoint-url", container.address, "--prompt", "x", "--stream", "--json"
        )
        assert (document(told)["result"]["text"], document(told)["result"]["parts"]) == ("Paris", 3)


@pytest.mark.parametrize(
    ("url", "code", "kind"), [("unix:s", 2, "bad_argument"), ("unix:/no/s", 4, "ModelError")]
)
def test_a_socket_that_cannot_be_called_is_said_so(strongroom: Run, url: str, code: int, kind: str) -> None:
    done = strongroom("invoke", "--endpoint-url", url, "--prompt", "x", "--json")
    assert (done.returncode, document(done)["error"]["kind"]) == (code, kind)


def test_serve_becomes_the_server_with_the_same_process_id(tmp_path: Path) -> None:
    """A stand-in package on the path shows what the real one is given."""
    package = tmp_path / "sagemaker_entry"
    package.mkdir()
    (package / "__init__.py").touch()
    told = "import json, os, sys\n"
    told += "print(json.dumps([sys.argv[1:], os.getpid(), os.environ['STRONGROOM_PORT'],"
    told += " [n for n in os.environ if n.startswith('AWS_')]]))\nsys.exit(7)\n"
    (package / "__main__.py").write_text(told, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "infra.__main__", "serve", "--port", "8123", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": "secret"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    shown = json.loads(done.stdout)
    arguments, pid, port, aws = json.loads(done.stderr)
    assert (arguments, port, aws) == (["serve"], "8123", [])
    assert shown["result"] == {"pid": pid, "host": "127.0.0.1", "port": "8123"}


def test_doctor_reports_each_check_and_fails_when_one_fails(strongroom: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x" * 10)
    with ScriptedContainer(reply()) as container:
        port = container.address.rpartition(":")[2]
        done = strongroom("doctor", "--port", port, "--model", str(tmp_path), "--json")
    found = document(done)
    checks = {check["name"]: check for check in found["result"]["checks"]}
    assert set(checks) == {"python", "cores", "memory", "packages", f"port {port}", "model"}
    assert checks[f"port {port}"]["ok"] is False
    assert checks[f"port {port}"]["hint"]
    assert checks["model"]["ok"] is True
    assert (done.returncode, found["ok"]) == (1, False)
