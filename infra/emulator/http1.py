"""One HTTP/1.1 response, parsed from bytes as they arrive.

Owns: heads, the three body framings, what counts as a broken body. Must not know: sockets, time, SageMaker.
Invariant: body bytes come out as soon as they are in, at most one chunk of the peer's per piece; a response
is complete only when its framing says so, never because the connection ended (except where that is
the framing).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

HEAD_BYTES: Final = 64 * 1024  # longest head accepted, as in most clients
CHUNK_LINE_BYTES: Final = 1024  # longest chunk size line or trailer line, extensions included
CHUNK_BYTES: Final = 1 << 40  # largest chunk size believed

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n\0]*)?")
_HEADER_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?")

Headers = Sequence[tuple[str, str]]


class MalformedResponse(Exception):
    """The peer's bytes are not HTTP/1.1."""


class TruncatedResponse(Exception):
    """The connection ended before the response did."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers of a response; values may hold content and are kept out of the repr."""

    status: int
    headers: Headers = field(repr=False)

    def get(self, name: str) -> str | None:
        """Return the first value of header `name`, None when it is absent."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)


class ResponseParser:
    """Turns bytes into one head and pieces of body.

    Feed bytes, then take `head` and drain `pieces()`; `complete` says when the response has ended. Call
    `end_of_input` when the peer has closed: it raises TruncatedResponse when something is missing.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        self.complete = False
        self._buffer = bytearray()
        self._left: int | None = None  # bytes left of the body or of the current chunk
        self._chunked = False
        self._in_trailer = False
        self._chunk_end = False  # the CRLF after a chunk's data is due

    def feed(self, data: bytes) -> None:
        """Take `data`; raises MalformedResponse for a bad head."""
        self._buffer += data
        while self.head is None and self._take_head():
            pass

    def pieces(self) -> Iterator[bytes]:
        """Yield the body bytes now at hand; raises MalformedResponse for bad chunk framing."""
        if self.head is None:
            return
        if self._chunked:
            yield from self._chunks()
        elif not self.complete:
            piece = self._take(self._left)
            if piece:
                yield piece
            if self._left == 0:
                self.complete = True

    def end_of_input(self) -> None:
        """Note that the peer has closed; raises TruncatedResponse unless that is how the body ends."""
        if self.head is not None and not self._chunked and self._left is None:
            self.complete = True
        if not self.complete:
            raise TruncatedResponse

    def _take_head(self) -> bool:
        """Parse a head if it is whole; return True when another one may follow (informational 1xx)."""
        end = self._buffer.find(b"\r\n\r\n")
        if end > HEAD_BYTES or (end < 0 and len(self._buffer) > HEAD_BYTES):
            raise MalformedResponse("the head is too large")
        if end < 0:
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        match = _STATUS_LINE.fullmatch(first)
        if match is None:
            raise MalformedResponse("the status line is malformed")
        status = int(match[2])
        headers = tuple(_header(line) for line in lines)
        if 100 <= status < 200:
            if status == 101:
                raise MalformedResponse("no other protocol was asked for")
            return True
        self.head = Head(status, headers)
        self._choose_framing(self.head)
        return False

    def _choose_framing(self, head: Head) -> None:
        codings = [value.lower() for key, value in head.headers if key.lower() == "transfer-encoding"]
        lengths = {value for key, value in head.headers if key.lower() == "content-length"}
        if codings and (codings != ["chunked"] or lengths):
            raise MalformedResponse("the body has no single framing")
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", value) for value in lengths):
            raise MalformedResponse("the content length is malformed")
        self._chunked = bool(codings)
        if head.status in (204, 304):
            self._chunked, self._left = False, 0
        elif lengths:
            self._left = int(lengths.pop())
        self.complete = not self._chunked and self._left == 0

    def _take(self, limit: int | None) -> bytes:
        piece = bytes(self._buffer if limit is None else self._buffer[:limit])
        del self._buffer[: len(piece)]
        if self._left is not None:
            self._left -= len(piece)
        return piece

    def _chunks(self) -> Iterator[bytes]:
        while not self.complete:
            if self._left:
                piece = self._take(self._left)
                if not piece:
                    return
                self._chunk_end = self._left == 0
                yield piece
            elif not self._next_chunk():
                return

    def _next_chunk(self) -> bool:
        """Take one line of chunk framing; return False when it is not whole yet."""
        line = self._take_line()
        if line is None:
            return False
        if self._chunk_end:
            if line:
                raise MalformedResponse("a chunk is longer than its size")
            self._chunk_end = False
        elif self._in_trailer:
            self.complete = not line
        else:
            match = _CHUNK_LINE.fullmatch(line)
            if match is None or int(match[1], 16) > CHUNK_BYTES:
                raise MalformedResponse("a chunk size is malformed")
            self._left = int(match[1], 16)
            self._in_trailer = self._left == 0
        return True

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n", 0, CHUNK_LINE_BYTES)
        if end < 0:
            if len(self._buffer) >= CHUNK_LINE_BYTES:
                raise MalformedResponse("a chunk line is too long")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line


def _header(line: bytes) -> tuple[str, str]:
    match = _HEADER_LINE.fullmatch(line)
    if match is None:
        raise MalformedResponse("a header line is malformed")
    return match[1].decode("ascii"), match[2].decode("latin-1")
