"""The ring: order, wholeness, wrapping, slow and dead readers, writers that die in the middle."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from container.ranks import ring as ring_module
from container.ranks.memory import Memory
from container.ranks.ring import (
    LINE_WORDS,
    MAX_MESSAGE_BYTES,
    PAYLOAD_BYTES,
    SLOT_HEAD,
    SLOTS,
    RingBroken,
    RingReader,
    RingWriter,
    create,
)


@pytest.fixture
def fd() -> Iterator[int]:
    number = create(2)
    yield number
    os.close(number)


def ends(fd: int, wait_s: float = 2.0) -> tuple[RingWriter, RingReader, RingReader]:
    return RingWriter(fd, 2, wait_s), RingReader(fd, 2, 0), RingReader(fd, 2, 1)


def set_counters(fd: int, value: int) -> None:
    memory = Memory(fd)
    for word in (0, LINE_WORDS, 2 * LINE_WORDS):
        memory.store(word, value)
    memory.close()


def test_every_reader_gets_every_message_in_order(fd: int) -> None:
    writer, *readers = ends(fd)
    for number in range(3 * SLOTS):  # three times around
        writer.send(b"%d" % number)
        for reader in readers:
            assert reader.receive(1.0) == b"%d" % number


def test_readers_need_not_keep_pace_with_each_other(fd: int) -> None:
    writer, first, second = ends(fd)
    for number in range(SLOTS):
        writer.send(b"%d" % number)
    assert [first.receive(1.0) for _ in range(SLOTS)] == [b"%d" % n for n in range(SLOTS)]
    assert [second.receive(1.0) for _ in range(SLOTS)] == [b"%d" % n for n in range(SLOTS)]


@pytest.mark.parametrize("size", [1, PAYLOAD_BYTES - 1, PAYLOAD_BYTES, PAYLOAD_BYTES + 1, 5 * PAYLOAD_BYTES])
def test_a_message_may_span_slots(fd: int, size: int) -> None:
    writer, first, second = ends(fd)
    message = random.Random(size).randbytes(size)
    for _ in range(3):
        writer.send(message)
        assert first.receive(1.0) == message
        assert second.receive(1.0) == message


def test_a_message_may_be_larger_than_the_ring(fd: int) -> None:
    writer, first, second = ends(fd)
    message = random.Random(1).randbytes(SLOTS * PAYLOAD_BYTES * 2 + 7)
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda r=r: got.append(r.receive(5.0))) for r in (first, second)]
    for thread in threads:
        thread.start()
    writer.send(message)
    for thread in threads:
        thread.join(5.0)
    assert got == [message, message]


@pytest.mark.parametrize("size", [0, MAX_MESSAGE_BYTES + 1])
def test_an_empty_or_oversize_message_is_refused_before_anything_is_written(fd: int, size: int) -> None:
    writer, first, _ = ends(fd)
    with pytest.raises(ValueError, match=f"a message of {size} bytes"):
        writer.send(bytes(size))
    with pytest.raises(RingBroken, match="no plan came"):
        first.receive(0.02)
    writer.send(b"next")
    assert first.receive(1.0) == b"next"


@pytest.mark.parametrize("start", [2**32 - 1, 2**32 - SLOTS, 2**31 - 3])
def test_the_counters_wrap(fd: int, start: int) -> None:
    set_counters(fd, start)
    writer, *readers = ends(fd)
    for number in range(2 * SLOTS + 5):
        writer.send(b"x" * (PAYLOAD_BYTES + 1) if number % 7 == 0 else b"%d" % number)
        for reader in readers:
            assert len(reader.receive(1.0)) in (PAYLOAD_BYTES + 1, len(b"%d" % number))


def test_a_reader_that_takes_nothing_is_given_up_after_the_deadline(fd: int) -> None:
    writer, first, _ = ends(fd, wait_s=0.1)
    began = time.monotonic()
    with pytest.raises(RingBroken, match="a rank takes no more plans"):
        for _ in range(SLOTS + 1):
            writer.send(b"x")
            first.receive(1.0)  # one reader alone is not enough
    assert 0.1 <= time.monotonic() - began < 1.0


def test_a_writer_that_dies_in_the_middle_leaves_nothing_to_act_on(fd: int) -> None:
    writer, first, _ = ends(fd)
    writer.send(b"whole")
    memory = Memory(fd)
    at = ring_module._slot_at(2, 1)
    SLOT_HEAD.pack_into(memory.bytes, at, 2, 4, 0, 0)  # all but the count of slots written
    memory.bytes[at + SLOT_HEAD.size : at + SLOT_HEAD.size + 4] = b"half"
    assert first.receive(1.0) == b"whole"
    with pytest.raises(RingBroken, match="no plan came"):
        first.receive(0.02)
    memory.close()


@pytest.mark.parametrize("head", [(5, 4, 0, 0), (1, 0, 0, 0), (1, PAYLOAD_BYTES + 1, 0, 0)])
def test_a_slot_that_does_not_hold_the_next_message_is_refused(fd: int, head: tuple[int, ...]) -> None:
    writer, first, _ = ends(fd)
    writer.send(b"good")
    memory = Memory(fd)
    SLOT_HEAD.pack_into(memory.bytes, ring_module._slot_at(2, 0), *head)
    with pytest.raises(RingBroken, match="does not hold the next plan"):
        first.receive(1.0)
    memory.close()


def test_a_message_without_end_is_given_up(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "MAX_MESSAGE_BYTES", 3 * PAYLOAD_BYTES)
    writer, first, _ = ends(fd)
    for _ in range(SLOTS):
        writer._put(memoryview(b"more"), True, time.monotonic() + 1.0)
    with pytest.raises(RingBroken, match="has no end"):
        first.receive(1.0)


def test_a_waiting_reader_sleeps_and_wakes_at_once() -> None:
    program = (
        "import resource, sys, time\n"
        "from container.ranks.ring import RingReader\n"
        "reader = RingReader(int(sys.argv[1]), 1, 0)\n"
        "reader.receive()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF)\n"
        "sent = float(reader.receive())\n"
        "late = time.monotonic() - sent\n"
        "after = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, late)\n"
    )
    fd = create(1)
    writer = RingWriter(fd, 1, 5.0)
    command = [sys.executable, "-c", program, str(fd)]
    with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as process:
        writer.send(b"start")
        time.sleep(1.5)
        writer.send(b"%f" % time.monotonic())
        out, _ = process.communicate(timeout=10)
    os.close(fd)
    cpu_s, late_s = map(float, out.split())
    assert cpu_s < 0.05, "it did not sleep"
    assert late_s < 0.25


def test_a_ring_cannot_be_cut_short_under_a_reader(fd: int) -> None:
    with pytest.raises(OSError):
        os.truncate(fd, 0)
