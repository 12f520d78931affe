"""The door: descriptors through it, rubbish through it, its two ends."""

import array
import os
import socket

import pytest

from container.ranks.door import DoorClosed, answer, knock, make_door
from tests.ranks.doubles import open_descriptors


@pytest.fixture
def door():
    front_fd, engine_fd = make_door()
    yield front_fd, engine_fd
    os.close(front_fd)
    os.close(engine_fd)


def send(front_fd: int, data: bytes, fds: list[int]) -> None:
    with socket.socket(fileno=os.dup(front_fd)) as sender:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sender.sendmsg([data], ancillary)


def test_a_knock_gives_both_sides_one_connection(door):
    front_fd, engine_fd = door
    ours = knock(front_fd)
    (theirs,) = answer(engine_fd)
    ours.sendall(b"from the front")
    assert theirs.recv(100) == b"from the front"
    theirs.sendall(b"from the engine")
    assert ours.recv(100) == b"from the engine"
    ours.close()
    assert theirs.recv(1) == b""
    theirs.close()


def test_an_answer_without_a_knock_is_empty_and_does_not_block(door):
    assert answer(door[1]) == []


def test_adopted_connections_do_not_survive_exec_and_do_not_block(door):
    with knock(door[0]):
        (theirs,) = answer(door[1])
        assert not os.get_inheritable(theirs.fileno())
        assert not theirs.getblocking()
        theirs.close()


def test_a_knock_made_while_no_engine_runs_is_answered_by_the_next(door):
    with knock(door[0]) as ours:
        (theirs,) = answer(door[1])  # the engine's end was held by the supervisor alone until now
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
        theirs.close()


def test_when_the_engine_dies_every_worker_sees_the_end(door):
    workers = [knock(door[0]) for _ in range(5)]
    for theirs in answer(door[1]):
        theirs.close()
    assert [worker.recv(1) for worker in workers] == [b""] * 5
    for worker in workers:
        worker.close()


def test_whatever_is_no_stream_socket_is_closed_and_left_out(door):
    front_fd, engine_fd = door
    baseline = open_descriptors()
    pipe = os.pipe()
    datagram = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    for fd in (pipe[0], datagram[0].fileno(), tcp.fileno()):
        send(front_fd, b"k", [fd])
    send(front_fd, b"k", [])
    assert answer(engine_fd) == []
    for fd in pipe:
        os.close(fd)
    for sock in (*datagram, tcp):
        sock.close()
    assert open_descriptors() == baseline


def test_two_descriptors_in_one_knock_are_refused_without_a_leak(door):
    front_fd, engine_fd = door
    pair = socket.socketpair()
    baseline = open_descriptors()
    send(front_fd, b"k", [pair[0].fileno(), pair[1].fileno()])
    assert answer(engine_fd) == []
    assert open_descriptors() == baseline
    for sock in pair:
        sock.close()


def test_an_empty_packet_is_not_taken_for_the_end(door):
    send(door[0], b"", [])
    with knock(door[0]):
        (theirs,) = answer(door[1])
        theirs.close()


def test_a_door_without_a_front_says_so():
    front_fd, engine_fd = make_door()
    os.close(front_fd)
    with pytest.raises(DoorClosed):
        answer(engine_fd)
    os.close(engine_fd)


def test_knocks_nobody_answers_are_bounded_and_leak_nothing(door):
    baseline = open_descriptors()
    mine = []
    with pytest.raises(OSError):
        for _ in range(100_000):
            mine.append(knock(door[0]))
    while theirs := answer(door[1]):
        for sock in theirs:
            sock.close()
    for sock in mine:
        sock.close()
    assert open_descriptors() == baseline
