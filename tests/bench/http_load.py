"""Streams over HTTP, many at once, each at its time; when every piece of text came.

Owns: the connections it opens and the reading of server-sent events. Must not know: which server it is.
Invariant: events are timed as they arrive and never parsed: a pattern finds pieces and totals.
Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.figures import Timed
from tests.bench.workloads import Request

STREAM_LIMIT_S: Final = 900.0
LINE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked and what its events look like.

    `piece` matches an event that carries text. `total`, with one group, is the number of tokens made;
    the last match of a stream counts. A token whose text is held back (half a character) comes with a later
    piece, so pieces are at most tokens; the difference is counted with the last piece.
    """

    path: str
    body: Callable[[Request], dict[str, Any]]
    piece: re.Pattern[bytes]
    total: re.Pattern[bytes]


async def load(port: int, dialect: Dialect, requests: Sequence[Request]) -> list[Timed]:
    """Send every request at its time and return what came back, times relative to the start of this call."""
    bodies = [json.dumps(dialect.body(request)).encode() for request in requests]
    began_s = time.perf_counter()

    async def one(request: Request, body: bytes) -> Timed:
        await asyncio.sleep(max(0.0, request.at_s - (time.perf_counter() - began_s)))
        try:
            return await asyncio.wait_for(_stream(port, dialect, body, began_s), STREAM_LIMIT_S)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # TimeoutError is an OSError
            return Timed((), f"{type(error).__name__}")

    return list(await asyncio.gather(*map(one, requests, bodies)))


async def _stream(port: int, dialect: Dialect, body: bytes, began_s: float) -> Timed:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE_BYTES)
    try:
        head = (
            f"POST {dialect.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status, chunked = await _head(reader)
        if status != 200:
            return Timed((), str(status))
        return await _events(reader, chunked, dialect, began_s)
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # the server broke it off; what was read is judged above
            await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Return status and whether the body is chunked; raises ValueError on what is no HTTP reply."""
    status = int((await reader.readline()).split()[1])
    chunked = False
    while (line := (await reader.readline()).strip()) != b"":
        chunked = chunked or line.lower() == b"transfer-encoding: chunked"
    return status, chunked


async def _part(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    """Return what came next of the body; empty at its end."""
    if not chunked:
        return await reader.read(1 << 16)
    size = int((await reader.readline()).split(b";")[0], 16)
    return (await reader.readexactly(size + 2))[:size]


async def _events(reader: asyncio.StreamReader, chunked: bool, dialect: Dialect, began_s: float) -> Timed:
    times: list[float] = []
    total, left, failed = 0, b"", False
    while part := await _part(reader, chunked):
        now_s = time.perf_counter() - began_s
        *events, left = (left + part).split(b"\n\n")
        for event in events:
            if dialect.piece.search(event):
                times.append(now_s)
            if found := dialect.total.findall(event):
                total = int(found[-1])
            failed = failed or event.startswith((b'data: {"error"', b"error:"))
    if failed:
        return Timed((), "error event")
    return Timed(tuple(spread(times, total, time.perf_counter() - began_s)))


def spread(times: Sequence[float], total: int, ended_s: float) -> list[tuple[float, int]]:
    """Return one event per piece, `total` tokens in all; raises ValueError when pieces outnumber tokens."""
    if len(times) > total:
        raise ValueError("a stream had more pieces of text than tokens")
    if not times:
        return [(ended_s, total)] if total else []
    return [*((at, 1) for at in times[:-1]), (times[-1], 1 + total - len(times))]
