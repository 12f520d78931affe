"""The heartbeat page: layout, torn writes, rights, and the table of verdicts."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import fields, replace

import pytest

from container.ranks.heartbeat import (
    MAGIC,
    PAGE_BYTES,
    EngineState,
    HealthLimits,
    HeartbeatReader,
    HeartbeatWriter,
    Snapshot,
    Verdict,
    health,
    make_page,
    read_only,
)

S = 10**9
NOW = 1000 * S
READY = Snapshot(state=EngineState.READY, pid=7, beat_ns=NOW, progress_ns=NOW, steps=5)
BUSY = replace(READY, running=1)


@pytest.fixture
def page():
    fd = make_page()
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("snapshot", "verdict"),
    [
        (Snapshot(), Verdict.STARTING),
        (replace(READY, state=EngineState.STARTING), Verdict.STARTING),
        (replace(READY, state=EngineState.LOADING), Verdict.LOADING),
        (replace(READY, state=EngineState.LOADING, beat_ns=NOW - 599 * S), Verdict.LOADING),
        (replace(READY, state=EngineState.LOADING, beat_ns=NOW - 601 * S), Verdict.SILENT),
        (READY, Verdict.READY),
        (replace(READY, beat_ns=NOW - 19 * S // 10), Verdict.READY),
        (replace(READY, beat_ns=NOW - 21 * S // 10), Verdict.SILENT),
        (replace(READY, progress_ns=0), Verdict.READY),  # nothing to do: nothing to move
        (replace(READY, beat_ns=NOW + 5 * S), Verdict.READY),  # read while it was being written
        (BUSY, Verdict.READY),
        (replace(BUSY, beat_ns=NOW - 9 * S), Verdict.READY),  # inside one long step
        (replace(BUSY, beat_ns=NOW - 11 * S), Verdict.SILENT),
        (replace(BUSY, progress_ns=NOW - 9 * S), Verdict.READY),
        (replace(BUSY, progress_ns=NOW - 11 * S), Verdict.STUCK),
        (replace(READY, waiting=1, progress_ns=NOW - 11 * S), Verdict.STUCK),
        (replace(BUSY, waiting=10**6), Verdict.READY),  # load alone never turns it
        (replace(BUSY, steps=0, beat_ns=NOW - 119 * S), Verdict.READY),  # the first step is cold
        (replace(BUSY, steps=0, beat_ns=NOW - 121 * S), Verdict.SILENT),
        (replace(BUSY, step_p99_ns=4 * S, beat_ns=NOW - 19 * S), Verdict.READY),
        (replace(BUSY, step_p99_ns=4 * S, beat_ns=NOW - 21 * S), Verdict.SILENT),
        (replace(READY, state=EngineState.DRAINING), Verdict.DRAINING),
        (replace(BUSY, state=EngineState.DRAINING, beat_ns=NOW - 11 * S), Verdict.SILENT),
        (replace(READY, state=EngineState.FAILED), Verdict.FAILED),
        (replace(READY, state=EngineState.STOPPED), Verdict.FAILED),
        (replace(READY, state=12345), Verdict.FAILED),
    ],
)
def test_the_verdict_is(snapshot, verdict):
    assert health(snapshot, NOW) is verdict


def test_the_limits_can_be_set():
    limits = HealthLimits(idle_beat_s=0.5)
    assert health(replace(READY, beat_ns=NOW - S), NOW, limits) is Verdict.SILENT


def test_every_field_is_read_back_as_written(page):
    values = {f.name: i + 1 for i, f in enumerate(fields(Snapshot))}
    with HeartbeatWriter(page) as writer:
        writer.write(**values)
    reader = HeartbeatReader(page)
    assert reader.read() == Snapshot(**values)
    reader.close()


def test_a_new_page_says_starting(page):
    reader = HeartbeatReader(page)
    assert reader.read() == Snapshot()
    reader.close()


def test_a_new_engine_counts_its_start_and_clears_the_rest(page):
    with HeartbeatWriter(page) as writer:
        writer.begin(41, 10)
        writer.write(state=EngineState.READY, steps=99, fault=3)
        writer.begin(42, 20)
        reader = HeartbeatReader(page)
        assert reader.read() == Snapshot(pid=42, starts=2, beat_ns=20, progress_ns=20)
        reader.close()


def test_an_unknown_field_is_refused(page):
    with HeartbeatWriter(page) as writer, pytest.raises(KeyError):
        writer.write(prompt=1)


def test_a_snapshot_is_never_torn_while_the_writer_lives(page):
    stop = threading.Event()

    def write() -> None:
        with HeartbeatWriter(page) as writer:
            n = 0
            while not stop.is_set():
                n += 1
                writer.write(steps=n, accepted=n, completed=n, refused=n)

    thread = threading.Thread(target=write)
    thread.start()
    reader = HeartbeatReader(page)
    try:
        for _ in range(1000):
            snapshot = reader.read()
            assert snapshot.steps == snapshot.accepted == snapshot.completed == snapshot.refused
    finally:
        stop.set()
        thread.join()
        reader.close()


def test_a_reader_that_meets_a_write_waits_for_its_end(page, monkeypatch):
    with mmap.mmap(page, PAGE_BYTES) as raw, memoryview(raw).cast("Q") as words:
        words[1] = 7
        writer = HeartbeatWriter(page)

        def finish(pause_s: float) -> None:
            writer.write(steps=5, accepted=5)

        monkeypatch.setattr("container.ranks.heartbeat.time.sleep", finish)
        reader = HeartbeatReader(page)
        snapshot = reader.read()
        assert (snapshot.steps, snapshot.accepted) == (5, 5)
        reader.close()
        writer.close()


def test_a_writer_killed_in_mid_write_hides_nothing_and_the_next_one_heals_it(page):
    with mmap.mmap(page, PAGE_BYTES) as raw, memoryview(raw).cast("Q") as words:
        words[1] = 7  # odd: a write began and never ended
        reader = HeartbeatReader(page)
        assert reader.read() == Snapshot()
        with HeartbeatWriter(page) as writer:
            writer.write(steps=1)
        assert words[1] % 2 == 0
        assert reader.read().steps == 1
        reader.close()


def test_the_front_s_descriptor_cannot_write(page):
    fd = read_only(page)
    with pytest.raises(PermissionError):
        HeartbeatWriter(fd)
    with pytest.raises(OSError):
        os.pwrite(fd, b"x", 0)
    HeartbeatReader(fd).close()
    os.close(fd)


def test_nobody_can_shrink_the_page_under_a_reader(page):
    with pytest.raises(PermissionError):
        os.truncate(page, 0)


def test_what_is_no_page_is_refused():
    fd = os.memfd_create("other")
    os.truncate(fd, PAGE_BYTES)
    with pytest.raises(ValueError, match="not a heartbeat page"):
        HeartbeatReader(fd)
    os.close(fd)


def test_all_fields_fit_the_page():
    assert (2 + len(fields(Snapshot))) * 8 <= PAGE_BYTES
    assert MAGIC < 2**64


def test_last_words_are_not_overwritten(page):
    with HeartbeatWriter(page) as writer:
        reader = HeartbeatReader(page)
        writer.write(state=EngineState.READY)
        writer.write_last(state=EngineState.FAILED)
        late = threading.Thread(target=lambda: writer.write(state=EngineState.READY), daemon=True)
        late.start()
        late.join(0.1)
        assert late.is_alive(), "it went on writing"
        assert reader.read().state == EngineState.FAILED
        writer._turn.release()
        late.join(5.0)
        reader.close()
