"""The real image with a real docker daemon: built, judged, run, and judged again with faults put into it.

Not part of the ordinary suite, which needs no daemon: scripts/test-image runs it. STRONGROOM_IMAGE names an
image that is built already. STRONGROOM_IMAGE_AGAIN=1 builds it a second time from nothing and compares.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.image import build, check
from infra.image.checks import runtime
from infra.image.checks.table import Result
from infra.image.container import HARDENED, TMPFS, Container, Facts, observe
from infra.image.docker import docker, run

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]
QUESTION = json.dumps(
    {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 48,
        "temperature": 0,
    }
)
# One layer on top of the image with the faults that a careless Dockerfile makes.
FAULTY = """FROM {tag}
COPY faults /
COPY --chown=4711:4711 faults/etc/loose /etc/stranger
USER 0
ENV HF_TOKEN=abc PYTHONPATH=/tmp
EXPOSE 22
HEALTHCHECK CMD ["/bin/true"]
"""
FAULTS = {
    "usr/bin/curl": (b"x", 0o755),
    "bin/dash": (b"x", 0o755),
    "etc/loose": (b"x", 0o666),
    "etc/key.pem": (b"-----BEGIN " + b"PRIVATE KEY-----", 0o600),
    "root/.cache/x": (b"x", 0o644),
    "etc/shadow": (b"root:$y$abc:1::\n", 0o600),
    "etc/ssl/certs/ca-certificates.crt": (b"x", 0o644),
    "opt/strongroom/lib/python3.11/site-packages/x.pth": (b"import os\n", 0o644),
    "opt/strongroom/lib/python3.11/site-packages/flask/app.py": (b"changed\n", 0o644),
    "opt/model.pkl": (b"x", 0o644),
}
# 6 is not among them: docker's COPY takes the setuid bit off (shown to fail in test_image_checks.py).
SEEN = {1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 23, 26, 27, 30}


@pytest.fixture(scope="module")
def tag() -> str:
    named = os.environ.get("STRONGROOM_IMAGE")
    if named:
        return named
    name = f"{build.NAME}:{build.version()}-cpu"
    report = build.build(build.Told("cpu", "", name, build.ROOT / ".cache" / "image", clean=False))
    assert report["ok"] and report["unpacked_mb"] <= 1200
    return name


@pytest.fixture(scope="module")
def hardened(tag: str, demo_checkpoint: Path) -> Facts:
    return check.started("as its own user", Container(tag, demo_checkpoint))


def failed(results: list[Result]) -> dict[int, tuple[str, ...] | None]:
    return {result.number: result.findings for result in results if not result.passed}


def test_the_image_passes_every_check_of_a_saved_image(tag: str) -> None:
    assert failed(check.saved_checks(tag, "cpu")) == {}


def test_the_image_passes_every_check_of_a_running_container(tag: str, demo_checkpoint: Path) -> None:
    assert failed(runtime.TABLE.run(check.run_all(tag, demo_checkpoint))) == {}


@pytest.fixture(scope="module")
def faulty(tag: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "Dockerfile").write_text(FAULTY.format(tag=tag))
    for name, (content, mode) in FAULTS.items():
        path = folder / "faults" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
    name = f"{tag}-faulty"
    docker("build", "--network", "none", "-t", name, str(folder))
    yield name
    docker("rmi", name)


def test_a_careless_layer_on_top_of_it_is_seen_by_every_check_it_concerns(faulty: str) -> None:
    assert set(failed(check.saved_checks(faulty, "cpu"))) >= SEEN


def test_a_container_that_runs_without_the_flags_is_seen(
    tag: str, demo_checkpoint: Path, hardened: Facts
) -> None:
    loose = check.started(
        "loosely", Container(tag, demo_checkpoint, flags=("--network", "none", "--ipc", "shareable"))
    )
    ran = runtime.Ran(loose, loose, hardened, hardened)
    assert {31, 35, 36, 37, 38} <= set(failed(runtime.TABLE.run(ran)))


def test_a_container_without_the_lockdown_is_seen(tag: str, demo_checkpoint: Path, hardened: Facts) -> None:
    flags = [part for part in HARDENED if part not in ("--security-opt", "no-new-privileges")]
    off = Container(tag, demo_checkpoint, flags=flags, environment={"STRONGROOM_LOCKDOWN": "off"})
    unlocked = check.started("unlocked", off)
    found = failed(runtime.TABLE.run(dataclasses.replace(runtime.Ran(*[hardened] * 4), hardened=unlocked)))
    assert {33, 45} <= set(found)
    assert unlocked.served


def test_it_answers_what_the_model_answers_outside(tag: str, demo_checkpoint: Path) -> None:
    with Container(tag, demo_checkpoint) as container:
        assert container.wait_healthy() is not None
        status, _, body = container.call("POST", "/invocations", QUESTION)
        assert status == 200
        assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("user", "command", "said"),
    [
        ("10001", "train", "`train` is not part of this version"),
        ("10001", "--help", "one argument is expected"),
        ("0", "serve", "started as root, but not allowed to go on as another user"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(tag: str, user: str, command: str, said: str) -> None:
    done = run("run", "--rm", "--user", user, *HARDENED, tag, command)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_the_verbs_are_commands_of_their_own_too(tag: str) -> None:
    done = run("run", "--rm", *HARDENED, "--entrypoint", "train", tag)
    assert done.returncode == 2
    assert "`train` is not part of this version" in done.stderr


def test_nothing_in_it_can_be_started_from_its_temporary_folder(tag: str) -> None:
    program = "import os; open('/tmp/x', 'w').close(); os.chmod('/tmp/x', 0o755); os.execv('/tmp/x', ['x'])"
    flags = ("--read-only", "--tmpfs", TMPFS, "--entrypoint", "/opt/strongroom/bin/python")
    done = run("run", "--rm", *flags, tag, "-c", program)
    assert "PermissionError" in done.stderr


if os.environ.get("STRONGROOM_IMAGE_AGAIN"):

    def test_a_second_build_from_nothing_is_the_same_image(tag: str) -> None:
        assert failed([check.again(tag, "cpu")]) == {}


def test_observing_a_container_that_cannot_start_says_so(tag: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with Container(tag, tmp_path) as container:
        facts = observe(container, QUESTION)
    assert facts.started_s is None
    assert "engine_cannot_start" in facts.log
