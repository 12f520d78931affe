"""Streams over HTTP from a scripted server: what is counted, when, and what counts as a failure."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.bench.drivers.llama_cpp import DIALECT as LLAMA
from tests.bench.drivers.ours_http import DIALECT as OURS
from tests.bench.drivers.ours_http import events_of
from tests.bench.figures import Timed
from tests.bench.http_load import Dialect, load, spread
from tests.bench.workloads import Request

PLAIN = Dialect(
    "/x", lambda r: {"n": r.output_tokens}, re.compile(rb'"t":"[^"]'), re.compile(rb'"total":(\d+)')
)


def chunk(text: str) -> bytes:
    return f"{len(text.encode()):x}\r\n{text}\r\n".encode()


def serve_once(
    pieces: list[bytes],
    requests: list[Request],
    status: str = "200 OK",
    dialect: Dialect = PLAIN,
    written_s: list[float] | None = None,
) -> tuple[list[Timed], list[dict[str, Any]]]:
    """Answer every request with the same body parts, 5 ms apart; return what was measured and asked.

    `written_s` gets when the server began and wrote each part, on one clock.
    """
    stamps = [] if written_s is None else written_s
    bodies: list[dict[str, Any]] = []

    handlers: list[asyncio.Task[Any] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(re.findall(rb"Content-Length: (\d+)", head)[0])
        bodies.append(json.loads(await reader.readexactly(size)))
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in pieces:
            stamps.append(time.perf_counter())
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.close()
        await writer.wait_closed()

    async def both() -> list[Timed]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            stamps.append(time.perf_counter())
            got = await load(server.sockets[0].getsockname()[1], dialect, requests)
            await asyncio.gather(*filter(None, handlers))
            return got

    return asyncio.run(both()), bodies


def test_pieces_are_timed_as_they_come_and_totals_are_exact() -> None:
    pieces = [chunk('data: {"t":"a"}\n\n'), chunk('data: {"t":""}\n\n'), chunk('data: {"t":"b"}\n\n')]
    pieces += [chunk('data: {"t":"","total":5}\n\ndata: [DONE]\n\n'), b"0\r\n\r\n"]
    written_s: list[float] = []
    got, bodies = serve_once(pieces, [Request((1,), 5)], written_s=written_s)
    (first_s, first), (last_s, rest) = got[0].events
    assert (first, rest) == (1, 4)
    began_s, *written_s = written_s
    assert last_s >= written_s[2] - written_s[0] >= 0.01  # not before it was written
    assert first_s < written_s[-1] - began_s  # and not only at the end
    assert bodies == [{"n": 5}]


def test_an_event_cut_in_two_is_counted_once() -> None:
    pieces = [chunk('data: {"t":'), chunk('"a"}\n'), chunk('\ndata: {"t":"b","total":2}\n\n'), b"0\r\n\r\n"]
    got, _ = serve_once(pieces, [Request((1,), 2)])
    assert [count for _, count in got[0].events] == [1, 1]


def test_a_refusal_is_its_status_and_a_broken_stream_an_error() -> None:
    assert serve_once([b"0\r\n\r\n"], [Request((1,), 2)], "429 Too Many Requests")[0] == [Timed((), "429")]
    got, _ = serve_once([chunk('data: {"t":"a"}\n\n')], [Request((1,), 2)])
    assert got[0].error and not got[0].events
    failed, _ = serve_once([chunk('data: {"error":{}}\n\n'), b"0\r\n\r\n"], [Request((1,), 2)])
    assert failed[0].error == "error event"


def test_requests_are_sent_at_their_times() -> None:
    pieces = [chunk('data: {"t":"a","total":1}\n\n'), b"0\r\n\r\n"]
    got, _ = serve_once(pieces, [Request((1,), 1), Request((1,), 1, 0.3)])
    assert got[0].events[0][0] < 0.3 <= got[1].events[0][0]


def test_tokens_without_text_are_counted_with_the_last_piece() -> None:
    assert spread([1.0, 2.0], 5, 3.0) == [(1.0, 1), (2.0, 4)]
    assert spread([], 1, 3.0) == [(3.0, 1)]
    assert spread([], 0, 3.0) == []
    with pytest.raises(ValueError, match="more pieces"):
        spread([1.0, 2.0], 1, 3.0)


@pytest.mark.parametrize(
    ("dialect", "text", "total"),
    [
        (OURS, b'data: {"id":"x","choices":[{"text":" a","index":0}],"usage":null}', None),
        (OURS, b'data: {"choices":[{"text":"","finish_reason":"length"}]}', None),
        (OURS, b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}', 7),
        (LLAMA, b'data: {"index":0,"content":" a","tokens":[5],"stop":false,"tokens_predicted":2}', 2),
        (LLAMA, b'data: {"index":0,"content":"","stop":true,"tokens_predicted":9}', 9),
    ],
)
def test_the_patterns_find_pieces_and_totals_of_real_events(
    dialect: Dialect, text: bytes, total: int | None
) -> None:
    found = dialect.total.findall(text)
    assert (int(found[-1]) if found else None) == total
    assert bool(dialect.piece.search(text)) == (b" a" in text)


@pytest.mark.parametrize("dialect", [OURS, LLAMA])
def test_every_server_is_asked_greedily_for_an_exact_length(dialect: Dialect) -> None:
    make: Callable[[Request], dict[str, Any]] = dialect.body
    body = make(Request((3, 4), 17))
    assert body["prompt"] == [3, 4] and body["temperature"] == 0
    assert body["ignore_eos"] is True and body["stream"] is True
    assert body.get("max_tokens", body.get("n_predict")) == 17


def test_phases_of_a_start_are_read_from_the_servers_log() -> None:
    log = 'noise\n{"time":1005.5,"event":"listening","pid":1}\n'
    log += '{"time":1006.25,"event":"child_started","child":"front"}\n'
    assert events_of(log, 1000.0) == {"log: listening": 5.5, "log: child_started front": 6.25}
