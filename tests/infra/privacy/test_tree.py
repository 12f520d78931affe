"""The whole pack in small: a server in a network of its own, watched while it is called, sound and leaking.

Needs root, for a network namespace; the same with the image is tests/infra/privacy_with_docker.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from infra.privacy import kernel, plan
from infra.privacy.detectors import TABLE, Observed
from infra.privacy.subject import in_a_namespace
from infra.privacy.watching import watch
from tests.sagemaker_entry.harness import ROOT, write_model

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make and watch a network")
ATTEMPTS, LOCKDOWN, ANSWERS, FILES, CHANGES = 5, 6, 9, 10, 11
# A kernel that does not tell of system calls cannot show attempts; everything else is shown without it.
ALWAYS = set() if kernel.available() else {ATTEMPTS}
SEES_ATTEMPTS = {ATTEMPTS}


def run(folder: Path, *launch: str, calls: int = 46, **environment: str) -> Observed:
    """Serve with the fake engine by the module and options of `launch`, and watch it."""
    status = folder / "status.json"
    told = {
        "PATH": os.environ["PATH"],
        "STRONGROOM_MODEL": str(write_model(folder / "model")),
        "STRONGROOM_ALLOW_PLAINTEXT": "on",
        "STRONGROOM_WORKERS": "1",
        **environment,
    }
    command = [sys.executable, "-m", *launch, "--status", str(status)]
    watched = in_a_namespace(command, told, folder, ROOT)
    return watch(watched, plan.make(calls, calls // 2), 0.0, lambda _: None)


def failed(seen: Observed) -> dict[int, tuple[str, ...] | None]:
    return {result.number: result.findings for result in TABLE.run(seen) if not result.passed}


def test_of_a_sound_server_nothing_is_found_and_every_call_is_answered(tmp_path: Path) -> None:
    seen = run(tmp_path, "tests.sagemaker_entry.launch")
    assert set(failed(seen)) == ALWAYS, failed(seen)
    assert seen.canaries == 23 and len(seen.processes) >= 3
    assert not any(packet.kind != "neighbour" for packet in seen.packets)
    if seen.asked is not None:
        assert seen.asked.processes >= 3 and seen.asked.refused["connect"] > 0


@pytest.mark.parametrize(
    ("way", "lockdown", "seen_by"),
    [
        ("connect", "off", {2, 4, ATTEMPTS, LOCKDOWN}),
        ("datagram", "off", {3, 4, ATTEMPTS, LOCKDOWN}),
        ("look_up", "off", {3, 4, ATTEMPTS, LOCKDOWN}),
        ("connect", "on", SEES_ATTEMPTS),  # refused, and noticed all the same
        ("datagram", "on", SEES_ATTEMPTS),
        ("stderr", "on", {7}),
        ("metrics", "on", {8, ANSWERS}),  # which somebody asked for
        ("answer", "on", {8, ANSWERS}),  # the metrics are one
        ("file", "on", {FILES, CHANGES}),
        ("shared", "on", {FILES, CHANGES}),
        ("breaks", "on", {1}),
    ],
)
def test_each_way_of_leaking_is_seen_by_its_detectors(
    tmp_path: Path, way: str, lockdown: str, seen_by: set[int]
) -> None:
    seen = run(tmp_path, "tests.infra.privacy.leaking", "--leak", way, STRONGROOM_LOCKDOWN=lockdown)
    found = failed(seen)
    for path in Path("/dev/shm").glob("strongroom-leak-*"):
        path.unlink()
    assert set(found) == seen_by | ALWAYS, found


def test_the_wrapper_alone_leaks_nothing(tmp_path: Path) -> None:
    seen = run(tmp_path, "tests.infra.privacy.leaking", "--leak", "nothing")
    assert set(failed(seen)) == ALWAYS, failed(seen)
    assert any(one.numbers for one in seen.memory), "what a process keeps is not seen in its memory"
