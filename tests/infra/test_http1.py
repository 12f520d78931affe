"""The response parser: what comes out, when, and what counts as broken."""

from __future__ import annotations

import pytest

from infra.emulator.http1 import HEAD_BYTES, MalformedResponse, ResponseParser, TruncatedResponse

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def feed(*pieces: bytes) -> tuple[ResponseParser, list[bytes]]:
    parser = ResponseParser()
    body: list[bytes] = []
    for piece in pieces:
        parser.feed(piece)
        body += parser.pieces()
    return parser, body


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (CHUNKED + b"3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: 1\r\n\r\n", b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)
def test_a_whole_response_is_complete_however_it_is_cut(data: bytes, body: bytes) -> None:
    for step in (1, 2, 3, len(data)):
        parser, pieces = feed(*(data[start : start + step] for start in range(0, len(data), step)))
        assert b"".join(pieces) == body
        assert parser.complete
        parser.end_of_input()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
        CHUNKED,
        CHUNKED + b"5\r\nhel",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
    ],
)
def test_a_response_that_ends_early_is_truncated(data: bytes) -> None:
    parser, _ = feed(data)
    assert not parser.complete
    with pytest.raises(TruncatedResponse):
        parser.end_of_input()


def test_a_body_without_framing_ends_with_the_connection() -> None:
    parser, pieces = feed(b"HTTP/1.1 200 OK\r\n\r\n", b"one", b"two")
    assert pieces == [b"one", b"two"]
    assert not parser.complete
    parser.end_of_input()
    assert parser.complete


def test_two_chunks_in_one_read_stay_two_pieces() -> None:
    _, pieces = feed(CHUNKED + b"1\r\na\r\n1\r\nb\r\n")
    assert pieces == [b"a", b"b"]


def test_half_a_chunk_comes_out_at_once() -> None:
    _, pieces = feed(CHUNKED + b"a\r\nhello")
    assert pieces == [b"hello"]


@pytest.mark.parametrize(
    "data",
    [
        b"NOPE\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"x" * (HEAD_BYTES + 1),
        CHUNKED + b"zz\r\n",
        CHUNKED + b"\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"fffffffffffffff\r\n",
        CHUNKED + b"1\r\nab\r\n",
        CHUNKED + b"1" * 2000,
    ],
)
def test_what_is_not_http_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedResponse):
        feed(data)


def test_a_heads_repr_shows_no_header_value() -> None:
    parser, _ = feed(b"HTTP/1.1 200 OK\r\nX-Note: canary\r\nContent-Length: 0\r\n\r\n")
    assert parser.head is not None
    assert parser.head.get("x-note") == "canary"
    assert "canary" not in repr(parser.head)
