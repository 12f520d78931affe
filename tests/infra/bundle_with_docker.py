"""The real image released, bundled, loaded and run with a real docker daemon, all without a network.

Not part of the ordinary suite: scripts/test-image runs it. Every step runs in a network namespace that has no
interface but a loopback that is down; docker is reached through its Unix socket.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.image import build
from infra.image.docker import docker, inspect, run
from infra.release import files, openssl
from scripts import demo, demo_image

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]
ALONE = ("unshare", "--net")
NAME = "strongroom-bundle-test"


@pytest.fixture(scope="module")
def tag() -> str:
    return os.environ.get("STRONGROOM_IMAGE") or demo_image.available()


def alone(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [*ALONE, *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(build.ROOT), **environment}
    return subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=900)


def test_the_demo_gives_one_answer_over_both_ways_and_as_every_user(tag: str, demo_checkpoint: Path) -> None:
    ok, report = demo.in_the_image(demo_checkpoint, tag, plain=False)
    assert ok, report


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "vendor.pem"
    openssl.make_key(path)
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, tag: str, key: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "release"
    done = alone(sys.executable, "-m", "infra.release.make", "--out", folder, "--key", key, "--tag", tag)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["components"]
    assert counts["pypi"] > 40 and counts["deb"] > 5
    return folder


def test_a_release_of_the_real_image_verifies_and_is_what_docker_holds(release: Path, tag: str) -> None:
    shown = openssl.fingerprint(release / files.PUBLIC_KEY)
    command = (sys.executable, "-m", "infra.release.verify", release, "--fingerprint", shown, "--loaded", tag)
    done = alone(*command)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, release: Path, key: Path, demo_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    options = ("--release", release, "--key", key, "--model", demo_checkpoint, "--out", out)
    done = alone(sys.executable, "-m", "infra.airgap.save", *options)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["bundle"])


@pytest.fixture
def removed() -> Iterator[None]:
    yield
    run("rm", "--force", NAME)


def test_a_bundle_is_moved_loaded_served_and_called_without_a_network(
    bundle: Path, release: Path, tag: str, tmp_path: Path, removed: None
) -> None:
    image_id = inspect(tag)["Id"]
    docker("rmi", "--no-prune", tag)
    moved = Path(shutil.move(bundle, tmp_path / "moved.tar"))
    shown = openssl.fingerprint(release / files.PUBLIC_KEY)
    done = alone(
        sys.executable, "-m", "infra.airgap.load", moved, "--fingerprint", shown, "--to", tmp_path / "to"
    )
    assert done.returncode == 0, done.stderr
    assert inspect(tag)["Id"] == image_id
    folder = Path(json.loads(done.stdout.splitlines()[-1])["folder"])
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    os.chown(sockets, 10001, 10001)
    run = ("/bin/sh", folder / "bin" / "run.sh", folder / "model", sockets, NAME)
    started = alone(*run, STRONGROOM_ALLOW_PLAINTEXT="on")
    assert started.returncode == 0, started.stderr
    asked = alone("/bin/sh", folder / "bin" / "smoke-test.sh", sockets)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)["answer"]["choices"][0]["message"]["content"]
    assert "Paris" in answer
    host = inspect(NAME, "container")["HostConfig"]
    assert (host["NetworkMode"], host["ReadonlyRootfs"], host["CapDrop"]) == ("none", True, ["ALL"])
    assert docker("diff", NAME) == ""
    docker("stop", "--time", "30", NAME)
    assert inspect(NAME, "container")["State"]["ExitCode"] == 0
    assert list(sockets.iterdir()) == [], "the socket is still there"
