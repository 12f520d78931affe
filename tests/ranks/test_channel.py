"""Framing under hostile bytes, and a channel's two limits."""

import random
import socket
import struct
import tracemalloc

import msgspec
import pytest

from container.ranks import messages
from container.ranks.channel import BACKLOG_BYTES, READ_BYTES, Channel, Fault, FrameDecoder, FrameError
from container.ranks.messages import Cancel, Deltas, Hello, decode_from_engine, frame
from tests.ranks.doubles import add

SEEDS = range(20)


@pytest.fixture
def pair():
    front, engine = socket.socketpair()
    channel = Channel(engine, 1)
    yield front, channel
    front.close()
    channel.close(Fault.CLOSED)


@pytest.mark.parametrize("seed", SEEDS)
def test_frames_cut_anywhere_come_out_whole_and_in_order(seed):
    rng = random.Random(seed)
    payloads = [rng.randbytes(rng.choice((1, 3, 4, 5, 1000, 70_000))) for _ in range(30)]
    stream = b"".join(messages.LENGTH.pack(len(p)) + p for p in payloads)
    decoder, out, at = FrameDecoder(), [], 0
    while at < len(stream):
        step = rng.choice((1, 2, 3, 7, 1000, 100_000))
        out += decoder.feed(stream[at : at + step])
        at += step
    assert out == payloads
    assert decoder.held_bytes == 0


@pytest.mark.parametrize("size", [0, messages.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_room_is_made(size):
    decoder = FrameDecoder()
    tracemalloc.start()
    with pytest.raises(FrameError):
        decoder.feed(struct.pack("<I", size) + b"x" * 100)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert decoder.held_bytes == 0


def test_a_frame_of_exactly_the_limit_passes():
    decoder = FrameDecoder(limit_bytes=10)
    assert decoder.feed(struct.pack("<I", 10) + b"y" * 10) == [b"y" * 10]
    with pytest.raises(FrameError):
        decoder.feed(struct.pack("<I", 11))


def test_an_unfinished_frame_holds_no_more_than_was_sent():
    decoder = FrameDecoder()
    decoder.feed(struct.pack("<I", messages.MAX_FRAME_BYTES) + b"z" * 10)
    assert decoder.held_bytes == 14


def test_messages_arrive_with_their_sizes(pair):
    front, channel = pair
    front.sendall(frame(Hello()) + frame(Cancel(3)))
    assert [(type(m), n) for m, n in channel.read()] == [(Hello, 8), (Cancel, 10)]
    assert channel.fault is None


@pytest.mark.parametrize(
    "payload",
    [
        b"\x00",
        b"\xc1",
        msgspec.msgpack.encode(["nonsense", 1]),
        msgspec.msgpack.encode(["cancel"]),
        msgspec.msgpack.encode(["cancel", 1, 2, 3]),
        msgspec.msgpack.encode(["cancel", 1, 16]),
        msgspec.msgpack.encode(["cancel", "1"]),
        msgspec.msgpack.encode(["cancel", 0]),
        msgspec.msgpack.encode(["cancel", -1]),
        msgspec.msgpack.encode(["cancel", 2**64 - 1]),
        msgspec.msgpack.encode(["cancel", 1.5]),
        msgspec.msgpack.encode(["cancel", True]),
        msgspec.msgpack.encode({"type": "cancel", "id": 1}),
        msgspec.msgpack.encode(["deltas", 1, []]),
        b"\x91" * 100_000,
        b"\x92\xa5hello\xa1\xff",
    ],
)
def test_a_malformed_frame_closes_the_channel_and_raises_nothing(pair, payload):
    front, channel = pair
    front.sendall(messages.LENGTH.pack(len(payload)) + payload)
    while channel.fault is None:
        assert channel.read() == []
    assert channel.fault is Fault.MALFORMED
    assert front.recv(1) == b""


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_frames_are_understood_or_close_the_channel(seed):
    rng = random.Random(seed)
    for _ in range(50):
        front, engine = socket.socketpair()
        channel = Channel(engine, 1)
        data = bytearray(frame(add(1, [1, 2, 3])))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        front.sendall(bytes(data[: rng.randint(1, len(data))]))
        front.close()
        while channel.fault is None:
            for message, _ in channel.read():
                assert isinstance(message, messages.FromFront)
        assert channel.fault in (Fault.MALFORMED, Fault.LEFT)


def test_a_peer_that_leaves_is_told_apart_from_one_that_breaks_the_rules(pair):
    front, channel = pair
    front.close()
    assert channel.read() == []
    assert channel.fault is Fault.LEFT


def test_one_read_takes_a_bounded_share(pair):
    front, channel = pair
    front.setblocking(False)
    sent = 0
    try:
        while True:
            sent += front.send(frame(Cancel(1)) * 1000)
    except BlockingIOError:
        pass
    assert sum(n + 4 for _, n in channel.read()) <= READ_BYTES


def test_what_the_socket_does_not_take_waits_and_is_sent_whole_later(pair):
    front, channel = pair
    frames = [frame(Deltas(i, [])) + b"" for i in range(3)]
    big = messages.LENGTH.pack(1_000_000) + b"b" * 1_000_000
    for data in (*frames, big, *frames):
        channel.send(data)
    assert channel.wants_write
    got = bytearray()
    want = len(big) + 2 * sum(map(len, frames))
    while len(got) < want:
        got += front.recv(1 << 20)
        channel.flush()
    assert bytes(got) == b"".join((*frames, big, *frames))
    assert not channel.wants_write
    assert channel.backlog_bytes == 0


def test_a_peer_that_does_not_read_is_cut_off_at_the_limit():
    front, engine = socket.socketpair()
    channel = Channel(engine, 1, backlog_bytes=1_000_000)
    data = b"d" * 100_000
    for _ in range(100):
        channel.send(data)
        assert channel.backlog_bytes <= 1_000_000
    assert channel.fault is Fault.BACKLOG
    assert BACKLOG_BYTES == 64 * 1024 * 1024
    front.close()


def test_sending_to_a_peer_that_left_is_no_error(pair):
    front, channel = pair
    front.close()
    channel.send(b"x" * 10)
    channel.send(b"x" * 10)
    assert channel.fault is Fault.LEFT


def test_the_first_fault_is_kept(pair):
    _, channel = pair
    channel.close(Fault.PROTOCOL)
    channel.close(Fault.CLOSED)
    assert channel.fault is Fault.PROTOCOL


def test_a_frame_beyond_the_limit_cannot_be_made():
    with pytest.raises(ValueError, match="exceeds"):
        frame(add(1, [0] * (messages.MAX_FRAME_BYTES // 4)))


def test_frames_survive_the_round_trip():
    data = frame(Deltas(7, []))
    assert decode_from_engine(data[4:]) == Deltas(7, [])
