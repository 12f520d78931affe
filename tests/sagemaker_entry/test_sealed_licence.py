"""A sealed start by licence: admitted once per container, its end told, its refusals one line each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from container.ranks.assembly import StartFailed
from container.ranks.heartbeat import (
    EngineState,
    HeartbeatReader,
    HeartbeatWriter,
    LoadPhase,
    StartFault,
    make_page,
)
from model_package import clock, hpke, licence, licence_form
from model_package.manifest import Manifest
from sagemaker_entry import metrics
from sagemaker_entry.errors import Code
from sagemaker_entry.health import Health, Seal
from sagemaker_entry.sealed import board
from tests.model_package import making
from tests.model_package.parties import DAY_S, NOW_S, terms
from tests.sagemaker_entry.test_sealed_parts import opened


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("licence")
    manifest = making.seal(making.model(folder / "plain"), folder / "sealed")
    (folder / "installation").write_bytes(bytes(making.key("installation")))
    (folder / "installation").chmod(0o400)
    return folder, manifest


@pytest.fixture
def fd() -> Iterator[int]:
    made = board.create()
    yield made
    os.close(made)


def issued(sealed: tuple[Path, Manifest], path: Path, epoch_min: int = 0) -> str:
    """Write a licence for the package and return the key source that names it."""
    folder, manifest = sealed
    keys = {manifest.package_id: making.key("data")}
    to = [hpke.public_of(making.key("installation"))]
    made = licence.make(terms(manifest.package_id, epoch_min=epoch_min), keys, to)
    path.write_bytes(licence_form.sign(made, making.key("vendor")))
    return f"licence:{path},file:{folder / 'installation'}"


def test_a_licence_opens_the_package_and_its_end_is_told(
    sealed: tuple[Path, Manifest], fd: int, tmp_path: Path
) -> None:
    opened(sealed[0], fd, started_s=NOW_S, key=issued(sealed, tmp_path / "licence"))
    told = board.read(fd)
    assert told is not None and told.licence is not None
    assert told.licence.not_after_s == terms(days=30).not_after_s


@pytest.mark.parametrize(
    ("days", "epoch_min", "said"),
    [(38, 0, "the licence has expired"), (0, 6, "revokes packages as old as this one")],
)
def test_a_licence_that_is_over_or_revokes_the_package_stops_the_start(
    sealed: tuple[Path, Manifest], fd: int, tmp_path: Path, days: int, epoch_min: int, said: str
) -> None:
    key = issued(sealed, tmp_path / "licence", epoch_min=epoch_min)
    with pytest.raises(StartFailed, match=said) as caught:
        opened(sealed[0], fd, started_s=NOW_S + days * DAY_S, key=key)
    assert caught.value.fault is StartFault.KEY_REFUSED
    assert not board.published(fd)


def test_a_licence_in_its_grace_starts(sealed: tuple[Path, Manifest], fd: int, tmp_path: Path) -> None:
    opened(sealed[0], fd, started_s=NOW_S + 33 * DAY_S, key=issued(sealed, tmp_path / "licence"))
    assert board.published(fd)


def test_a_clock_turned_back_stops_a_start_and_never_an_engine_that_restarts(
    sealed: tuple[Path, Manifest], fd: int, tmp_path: Path
) -> None:
    key = issued(sealed, tmp_path / "licence")
    state = tmp_path / "state"
    state.mkdir()
    opened(sealed[0], fd, started_s=NOW_S, key=key, state_dir=str(state))
    clock.record(state, NOW_S + 9 * DAY_S)  # another container that shares the state
    opened(sealed[0], fd, started_s=NOW_S, key=key, state_dir=str(state))
    other = board.create()
    with pytest.raises(StartFailed, match="the clock is behind the last start"):
        opened(sealed[0], other, started_s=NOW_S, key=key, state_dir=str(state))
    os.close(other)


def judged(*, sealed: bool, lockdown: bool = False, **page: int) -> Health:
    """Return the health of a front over a page that says `page`."""
    fd = make_page()
    with HeartbeatWriter(fd) as writer:
        now_ns = time.monotonic_ns()
        writer.write(pid=1, beat_ns=now_ns, progress_ns=now_ns, **page)
    own = metrics.Metrics(metrics.create(), 1)
    return Health(HeartbeatReader(fd), own, lockdown=lockdown, sealed=sealed)


LOCKED = {"state": EngineState.LOADING, "load_phase": LoadPhase.LOCKED}


def test_a_locked_engine_is_healthy_to_the_platform_and_takes_no_requests() -> None:
    health = judged(sealed=True, **LOCKED)
    error = health.error()
    assert error is not None and error.code is Code.LOCKED and error.status == 503
    assert health.locked() and health.seal() is Seal.LOCKED


def test_an_engine_that_loads_is_not_locked() -> None:
    health = judged(sealed=True, state=EngineState.LOADING, load_phase=LoadPhase.WEIGHTS)
    error = health.error()
    assert error is not None and error.code is Code.LOADING
    assert not health.locked() and health.seal() is Seal.SEALED


def test_a_locked_engine_is_not_healthy_before_the_lockdown_holds() -> None:
    health = judged(sealed=True, lockdown=True, **LOCKED)
    error = health.error()
    assert error is not None and error.code is Code.LOADING


def test_the_days_left_are_a_metric_where_there_is_a_licence() -> None:
    health = judged(sealed=True, state=EngineState.READY)
    assert "strongroom_licence_days_left" not in health.engine_series()
    for seconds, days in ((9.5 * DAY_S, 10), (60, 1), (-1.5 * DAY_S, -1)):
        health.licence_end_s = int(time.time() + seconds)
        assert health.engine_series()["strongroom_licence_days_left"] == ("gauge", days)
    assert health.engine_series()["strongroom_package_sealed"] == ("gauge", True)
    assert judged(sealed=False).seal() is Seal.PLAINTEXT
