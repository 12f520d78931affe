"""Loading and running: what docker is told, what is refused before it, what is unpacked."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from infra.airgap import load
from infra.image import container
from tests.infra.airgap.bundles import BUNDLE, Docker


def load_sh(bundle: Path, docker: Docker, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(bundle / "bin" / "load.sh"), *arguments]
    env = {"PATH": os.environ["PATH"], **docker.environment, **more}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)


def test_a_bundle_is_loaded_once_and_the_image_before_it_is_kept(
    bundle: Path, fingerprint: str, docker: Docker
) -> None:
    (docker.state / "strongroom:1-cpu").write_text("sha256:older\n")
    assert "would load" in load_sh(bundle, docker, fingerprint, "--dry-run").stderr
    assert "load" not in docker.calls
    done = load_sh(bundle, docker, fingerprint)
    assert done.returncode == 0, done.stderr
    assert docker.holds() == {
        "strongroom:1-cpu": docker.environment["LOADS"],
        "strongroom:previous": "sha256:older",
    }
    again = load_sh(bundle, docker, fingerprint)
    assert (again.returncode, docker.calls.count("load")) == (0, 1)
    assert "loaded already" in again.stderr
    command = ["/bin/sh", str(bundle / "bin" / "rollback.sh")]
    subprocess.run(command, env={"PATH": os.environ["PATH"], **docker.environment}, check=True)
    assert docker.holds()["strongroom:1-cpu"] == "sha256:older"


def test_another_image_than_the_signed_one_does_not_keep_the_name(
    bundle: Path, fingerprint: str, docker: Docker
) -> None:
    (docker.state / "strongroom:1-cpu").write_text("sha256:older\n")
    done = load_sh(bundle, docker, fingerprint, LOADS="sha256:other")
    assert done.returncode == 5 and "docker loaded sha256:other" in done.stderr
    assert docker.holds() == {"strongroom:1-cpu": "sha256:older"}


def test_nothing_is_loaded_of_a_bundle_that_was_tampered_with(
    bundle: Path, fingerprint: str, docker: Docker
) -> None:
    (bundle / "images" / "strongroom.tar.gz").write_bytes(b"another image")
    assert load_sh(bundle, docker, fingerprint).returncode == 5
    assert docker.calls == []


def test_a_machine_of_another_architecture_is_told_so(bundle: Path, fingerprint: str, docker: Docker) -> None:
    done = load_sh(bundle, docker, fingerprint, ARCH="arm64")
    assert done.returncode == 3 and "this machine is arm64, the image is amd64" in done.stderr


# Running: one set of flags, in three forms.


def run_command(bundle: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "sockets").mkdir()
    (tmp_path / "keys").mkdir()
    command = ["/bin/sh", str(bundle / "bin" / "run.sh"), "model", "sockets", "name", "--dry-run"]
    environment = os.environ | {"KEY_FOLDER": "keys", "STRONGROOM_KEY": "file:/run/secrets/key"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_run_takes_everything_away_that_the_checks_take_away(bundle: Path, tmp_path: Path) -> None:
    told = " ".join(run_command(bundle, tmp_path))
    hardened = " ".join(container.HARDENED)
    pairs = re.findall(r"(--[a-z-]+)(?: ([^-]\S*))?", hardened)
    assert len(pairs) > 9
    for flag, value in pairs:
        assert f"{flag} {value}".strip() in told, flag
    assert "--user 10001:10001" in told and "seccomp=" in told and "serve" in told
    assert f"--volume {tmp_path}/model:/opt/ml/model:ro" in told
    assert "--env STRONGROOM_LISTEN=unix:/run/strongroom/http.sock" in told
    assert f"--volume {tmp_path}/keys:/run/secrets:ro" in told
    # The names alone: docker takes their values from its own environment, no command line shows them.
    for name in ("KEY", "VENDOR_ROOTS", "CUSTOMER_ROOTS", "ALLOW_PLAINTEXT"):
        assert f"--env STRONGROOM_{name} " in told
    assert "file:/run/secrets/key" not in told
    assert "--publish" not in told and "--privileged" not in told


def test_the_unit_and_the_compose_file_start_the_same_container(bundle: Path, tmp_path: Path) -> None:
    told = run_command(bundle, tmp_path)
    unit = (bundle / "run" / "strongroom.service").read_text().replace("\\\n", " ")
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start is not None

    def flags(words: list[str]) -> set[str]:
        joined = " ".join(words)
        return {
            re.sub(r"(seccomp=|--volume )\S*?(/seccomp\.json|:/)", r"\1\2", f"{flag} {value}".strip())
            for flag, value in re.findall(r"(--[a-z-]+)(?: ([^-\s]\S*))?", joined)
        } - {"--detach", "--rm", "--restart unless-stopped", "--name name", "--name strongroom"}

    assert flags(start[1].split()) == flags(told)
    service = yaml.safe_load((bundle / "run" / "compose.yaml").read_text())["services"]["strongroom"]
    assert (service["network_mode"], service["read_only"], service["cap_drop"]) == ("none", True, ["ALL"])
    assert "no-new-privileges" in service["security_opt"] and service["pids_limit"] == container.PIDS
    assert service["tmpfs"] == [container.TMPFS] and service["ulimits"] == {"core": 0}
    assert service["user"] == "10001:10001" and service["ipc"] == "private" and service["shm_size"] == "64m"
    assert service["volumes"][0].endswith(":/opt/ml/model:ro") and "ports" not in service
    assert service["environment"]["STRONGROOM_LISTEN"] in " ".join(told)
    passed = {name for name, value in service["environment"].items() if value is None}
    assert passed == {word for word in told if re.fullmatch(r"STRONGROOM_[A-Z_]+", word)} and len(passed) == 4
    assert service["volumes"][2].endswith(":/run/secrets:ro")


# Unpacking.


def archive_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as written:
        for member in members:
            written.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    "members",
    [
        [member("b/x"), member("../evil")],
        [member("b/../../evil")],
        [member("/evil")],
        [member("b/x", tarfile.SYMTYPE, "/etc")],
        [member("b/x", tarfile.LNKTYPE, "b/y")],
        [member("b/x", tarfile.CHRTYPE)],
        [member("b/x", tarfile.FIFOTYPE)],
        [member("b/x"), member("c/x")],
        [member("b/x"), member("b/x")],
        [],
    ],
)
def test_an_archive_with_anything_but_one_plain_folder_is_not_unpacked(
    tmp_path: Path, members: list[tarfile.TarInfo]
) -> None:
    to = tmp_path / "in" / "here"
    to.mkdir(parents=True)
    with pytest.raises(load.BundleRefused):
        load.unpack(archive_of(tmp_path / "x.tar", *members), to)
    assert list(to.iterdir()) == [] and [path.name for path in to.parent.iterdir()] == ["here"]


def test_what_is_no_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.tar").write_bytes(b"no archive" * 100)
    assert load.main([str(tmp_path / "x.tar"), "--fingerprint", "0" * 64, "--to", str(tmp_path / "to")]) == 5
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_load_verifies_with_its_own_script_whatever_the_bundle_brings(
    bundle: Path, fingerprint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (bundle / "bin" / "verify.sh").write_text("#!/bin/sh\nexit 0\n")
    assert load.main([str(bundle), "--fingerprint", fingerprint]) == 5
    assert "bin/verify.sh is not what was signed" in capfd.readouterr().err


def test_load_of_the_archive_verifies_and_loads(
    packed: Path,
    fingerprint: str,
    tmp_path: Path,
    docker: Docker,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in docker.environment.items():
        monkeypatch.setenv(name, value)
    to = tmp_path / "to"
    assert load.main([str(packed), "--fingerprint", fingerprint, "--to", str(to), "--verify-only"]) == 0
    assert docker.calls == []
    shutil.rmtree(to)
    assert load.main([str(packed), "--fingerprint", fingerprint, "--to", str(to)]) == 0
    assert docker.calls.count("load") == 1
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["folder"] == str(to / BUNDLE)
