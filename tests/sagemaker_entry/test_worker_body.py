"""The body reader alone: every way of cutting the bytes, limits, deadlines."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from sagemaker_entry.body import BodyBudget, BodyLimits, BodyReader, ChunkedDecoder
from sagemaker_entry.errors import ApiError, Code


class Wire:
    """Hands out prepared pieces and moves a clock; what is given back is kept."""

    def __init__(self, pieces: Iterable[bytes], piece_s: float = 0.0) -> None:
        self._pieces = list(pieces)
        self._piece_s = piece_s
        self.now_s = 0.0
        self.given_back = b""
        self.continued = 0

    def receive(self, timeout_s: float) -> bytes:
        assert timeout_s > 0
        if self._piece_s > timeout_s:
            self.now_s += timeout_s
            raise TimeoutError
        self.now_s += self._piece_s
        return self._pieces.pop(0) if self._pieces else b""

    def give_back(self, data: bytes) -> None:
        self.given_back += data

    def go_on(self) -> None:
        self.continued += 1

    def reader(self, length: int | None, limit: int = 1000) -> BodyReader:
        limits = BodyLimits(limit)
        return BodyReader(self.receive, self.give_back, length, limits, self.go_on, lambda: self.now_s)


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """Return `data` in random pieces."""
    pieces = []
    while data:
        size = rng.randint(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def test_a_chunked_body_is_the_same_however_the_network_cuts_it() -> None:
    data = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-T: 1\r\n\r\nGET /next"
    for seed in range(200):
        wire = Wire(cut(data, random.Random(seed)))
        reader = wire.reader(None)
        assert reader.read() == b"hello world"
        assert reader.consumed
        assert reader.read() == b""
        assert b"GET /next".startswith(wire.given_back), "bytes of the next request were lost or added"
        assert wire.continued == 1


def test_a_body_with_a_length_takes_exactly_that_many_bytes() -> None:
    for seed in range(50):
        wire = Wire(cut(b"hello worldGET /next", random.Random(seed)))
        assert wire.reader(11).read() == b"hello world"
        assert b"GET /next".startswith(wire.given_back)


def test_no_body_is_read_for_a_length_of_zero() -> None:
    wire = Wire([b"GET /next"])
    reader = wire.reader(0)
    assert reader.consumed
    assert reader.read() == b""
    assert wire.continued == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"-2\r\n{}\r\n0\r\n\r\n", Code.BAD_REQUEST),
        (b"0x2\r\n{}\r\n0\r\n\r\n", Code.BAD_REQUEST),
        (b"\r\n", Code.BAD_REQUEST),
        (b" 2\r\n{}\r\n0\r\n\r\n", Code.BAD_REQUEST),
        (b"2\n{}\r\n0\r\n\r\n", Code.BAD_REQUEST),
        (b"2;a\rb\r\n{}\r\n0\r\n\r\n", Code.BAD_REQUEST),
        (b"2\r\n{}x", Code.BAD_REQUEST),
        (b"2\r\n{}\n0\r\n\r\n", Code.BAD_REQUEST),
        (b"2\r\n{", Code.BAD_REQUEST),  # the connection ends
        (b"2" * 300, Code.BAD_REQUEST),
        (b"f" * 33 + b"\r\n", Code.BAD_REQUEST),
        (b"3e9\r\n", Code.BODY_TOO_LARGE),
        (b"f" * 30 + b"\r\n", Code.BODY_TOO_LARGE),
        (b"2\r\n{}\r\n0\r\nbad name: x\r\n\r\n", Code.BAD_REQUEST),
        (b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n", Code.BAD_REQUEST),
        (b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 33 + b"\r\n", Code.HEADERS_TOO_LARGE),
        (b"2\r\n{}\r\n0\r\nX: " + b"y" * 9000, Code.HEADERS_TOO_LARGE),
    ],
)
def test_broken_chunking_is_refused_whole(data: bytes, code: Code) -> None:
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        wire = Wire(pieces)
        reader = wire.reader(None)
        with pytest.raises(ApiError) as caught:
            reader.read()
        assert caught.value.code is code
        assert not reader.consumed, "the connection would be used again"


def test_the_limit_is_exact_for_both_framings() -> None:
    assert Wire([b"x" * 1000]).reader(1000).read() == b"x" * 1000
    assert Wire([b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n"]).reader(None).read() == b"x" * 1000
    wire = Wire([b"x"])
    with pytest.raises(ApiError) as caught:
        wire.reader(1001).read()
    assert caught.value.code is Code.BODY_TOO_LARGE
    assert wire.continued == 0, "a client that asks first must not be told to send"
    over = Wire([b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n0\r\n\r\n"])
    with pytest.raises(ApiError) as caught:
        over.reader(None).read()
    assert caught.value.code is Code.BODY_TOO_LARGE


def test_chunks_must_carry_something_on_average() -> None:
    decoder = ChunkedDecoder(10**6)
    with pytest.raises(ApiError):
        for _ in range(3000):
            decoder.feed(b"1\r\nx\r\n")
    fair = ChunkedDecoder(10**6)
    for _ in range(3000):
        fair.feed(b"20\r\n" + b"x" * 32 + b"\r\n")


@pytest.mark.parametrize(
    ("piece", "piece_s", "length", "read", "after_s"),
    [
        (b"x", 1.0, 100, False, 5.0),  # under 1 KiB/s once the grace is over
        (b"x" * 2000, 1.0, 20_000, True, 10.0),
        (b"x" * 2000, 1.0, 40_000, False, 15.0),  # fast enough, but too long in all
        (b"", 60.0, 10, False, 5.0),  # nothing at all
    ],
)
def test_slow_bodies_are_given_up_at_the_deadline(
    piece: bytes, piece_s: float, length: int, read: bool, after_s: float
) -> None:
    wire = Wire([piece] * 1000, piece_s)
    reader = wire.reader(length, limit=10**6)
    if read:
        assert len(reader.read()) == length
    else:
        with pytest.raises(ApiError) as caught:
            reader.read()
        assert caught.value.code is Code.READ_TIMEOUT
    assert wire.now_s == pytest.approx(after_s, abs=1.0)


def budgeted(wire: Wire, budget: BodyBudget, length: int | None) -> BodyReader:
    return BodyReader(wire.receive, wire.give_back, length, BodyLimits(1000), None, lambda: 0.0, budget)


def test_all_bodies_of_a_worker_share_one_budget() -> None:
    budget = BodyBudget(1500)
    first = budgeted(Wire([b"x" * 1000]), budget, 1000)
    assert first.read() == b"x" * 1000
    second = budgeted(Wire([b"x" * 400, b"x" * 600]), budget, 1000)
    with pytest.raises(ApiError) as caught:
        second.read()
    assert (caught.value.code, caught.value.retry_after_s) == (Code.OVERLOADED, 1)
    assert not second.consumed, "the connection would be used again"
    assert budget.left_bytes == 100, "what was received of the refused body is still held"
    second.release()
    second.release()
    assert budget.left_bytes == 500
    first.release()
    assert budget.left_bytes == 1500
    third = budgeted(Wire([b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n"]), budget, None)
    assert third.read() == b"x" * 1000
    assert budget.left_bytes <= 500


def test_a_body_that_fails_leaves_nothing_taken() -> None:
    for wire, length in (
        (Wire([b"zz\r\n"]), None),
        (Wire([b"x"]), 10),
        (Wire([]), 10),
        (Wire([b"x"], 60.0), 9),
    ):
        budget = BodyBudget(100)
        reader = budgeted(wire, budget, length)
        with pytest.raises(ApiError):
            reader.read()
        reader.release()
        assert budget.left_bytes == 100
