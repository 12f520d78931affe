"""Request bodies: framing, size limit and read deadlines, in one place for both ways a body can be sent.

Owns: the chunked decoder (no I/O), the counting reader and its limits.
Must not know: what a body means, Flask, the arbiter's configuration.
Invariant: `read` returns the whole body or raises ApiError; a cut or oversized body is never handed on.

RFC 9112 section 7.1. Compared with the HTTP library's own reader: a declared chunk size is checked before its
data is waited for, chunk extensions and trailers are bounded tightly, and a storm of tiny chunks is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sagemaker_entry.errors import ApiError, Code

MAX_SIZE_LINE_BYTES: Final = 256  # size and extensions; nobody we know sends extensions
MAX_TRAILER_BYTES: Final = 8190
MAX_TRAILERS: Final = 32
FREE_CHUNKS: Final = 1024  # beyond these, chunks must carry at least MIN_CHUNK_BYTES on average
MIN_CHUNK_BYTES: Final = 16
BUDGET_RETRY_S: Final = 1
LARGE_BODY_BYTES: Final = 128 * 1024  # a few milliseconds of parsing

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,32})(?:[ \t]*;[\t !-~\x80-\xff]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t !-~\x80-\xff]*")
_FRAMING_TRAILERS = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"trailer", b"authorization", b"te")
)


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How large and how slow a body may be."""

    size_bytes: int
    total_s: float = 15.0
    grace_s: float = 5.0  # from then on the average must reach `bytes_per_s`
    bytes_per_s: float = 1024.0


class BodyBudget:
    """What all bodies of one worker may take together; else many large ones at once would take all memory."""

    def __init__(self, limit_bytes: int) -> None:
        self.left_bytes = limit_bytes

    def take(self, size_bytes: int) -> None:
        """Raises ApiError OVERLOADED when too little is left."""
        if size_bytes > self.left_bytes:
            raise ApiError(Code.OVERLOADED, retry_after_s=BUDGET_RETRY_S)
        self.left_bytes -= size_bytes

    def give(self, size_bytes: int) -> None:
        self.left_bytes += size_bytes


class ChunkedDecoder:
    """Decodes a chunked body as it arrives. `feed` until `done`; `rest` then belongs to the next request."""

    def __init__(self, size_limit_bytes: int) -> None:
        self.done = False
        self.rest = b""
        self._limit = size_limit_bytes
        self._line = bytearray()  # of a size line, a chunk's end or a trailer, while incomplete
        self._missing = 0  # bytes of the current chunk still to come
        self._after_data = False
        self._in_trailers = False
        self._chunks = 0
        self._bytes = 0
        self._trailers = 0
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the body bytes in `data`; raises ApiError on broken framing or a limit."""
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.done:
            if self._missing:
                piece = data[at : at + self._missing]
                at += len(piece)
                self._missing -= len(piece)
                self._after_data = not self._missing
                pieces.append(piece)
                continue
            end = data.find(b"\n", at)
            self._line += data[at:] if end < 0 else data[at : end + 1]
            if len(self._line) > (MAX_TRAILER_BYTES if self._in_trailers else MAX_SIZE_LINE_BYTES):
                raise ApiError(Code.HEADERS_TOO_LARGE if self._in_trailers else Code.BAD_REQUEST)
            if end < 0:
                break
            at = end + 1
            self._take_line()
        self.rest = data[at:] if self.done else b""
        return pieces

    def _take_line(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        if not line.endswith(b"\r\n"):
            raise ApiError(Code.BAD_REQUEST)  # a bare line feed ends nothing
        line = line[:-2]
        if self._in_trailers:
            self._take_trailer(line)
        elif self._after_data:
            if line:
                raise ApiError(Code.BAD_REQUEST)
            self._after_data = False
        else:
            self._take_size(line)

    def _take_size(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise ApiError(Code.BAD_REQUEST)
        size = int(match[1], 16)
        self._chunks += 1
        self._bytes += size
        if self._bytes > self._limit:
            raise ApiError(Code.BODY_TOO_LARGE, limit=self._limit)
        if self._chunks > FREE_CHUNKS + self._bytes // MIN_CHUNK_BYTES:
            raise ApiError(Code.BAD_REQUEST)
        self._missing = size
        self._in_trailers = size == 0

    def _take_trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
            return
        self._trailers += 1
        self._trailer_bytes += len(line)
        if self._trailers > MAX_TRAILERS or self._trailer_bytes > MAX_TRAILER_BYTES:
            raise ApiError(Code.HEADERS_TOO_LARGE)
        name = line.partition(b":")[0].lower()
        if _TRAILER_LINE.fullmatch(line) is None or name in _FRAMING_TRAILERS:
            raise ApiError(Code.BAD_REQUEST)


class BodyReader:
    """Reads one request's body, once.

    `receive(timeout_s)` returns the next bytes, b"" at the end of the connection, or raises TimeoutError.
    `give_back` takes bytes that belong to the next request. `length_bytes` is None for a chunked body.
    """

    def __init__(
        self,
        receive: Callable[[float], bytes],
        give_back: Callable[[bytes], None],
        length_bytes: int | None,
        limits: BodyLimits,
        before: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        budget: BodyBudget | None = None,
    ) -> None:
        self.consumed = length_bytes == 0  # the connection is at the start of the next request
        self._receive = receive
        self._give_back = give_back
        self._length = length_bytes
        self._limits = limits
        self._before = before  # tells a client that waits for `100 Continue` to go on
        self._clock = clock
        self._budget = budget
        self._held_bytes = 0

    def release(self) -> None:
        """Give the budget back, once the exchange no longer needs the body; idempotent."""
        if self._budget is not None:
            self._budget.give(self._held_bytes)
        self._held_bytes = 0

    def read(self) -> bytes:
        """Return the body; raises ApiError: 413, 408, 429, or 400 when it ends early or is badly framed."""
        if self.consumed:
            return b""
        if self._length is not None and self._length > self._limits.size_bytes:
            raise ApiError(Code.BODY_TOO_LARGE, limit=self._limits.size_bytes)
        if self._before is not None:
            self._before()
        body = self._read_chunked() if self._length is None else self._read_length(self._length)
        self.consumed = True
        return body

    def _read_length(self, length: int) -> bytes:
        body = bytearray()
        started = self._clock()
        while len(body) < length:
            body += self._next(started, len(body))
        if len(body) > length:
            self._give_back(bytes(body[length:]))
            del body[length:]
        return bytes(body)

    def _read_chunked(self) -> bytes:
        decoder = ChunkedDecoder(self._limits.size_bytes)
        pieces: list[bytes] = []
        received = 0
        started = self._clock()
        while not decoder.done:
            data = self._next(started, received)
            received += len(data)
            pieces += decoder.feed(data)
        if decoder.rest:
            self._give_back(decoder.rest)
        return b"".join(pieces)

    def _next(self, started: float, received: int) -> bytes:
        limits = self._limits
        # The rate rule says by when the next byte is due; the total rule caps that.
        due_s = min(limits.total_s, max(limits.grace_s, (received + 1) / limits.bytes_per_s))
        left_s = started + due_s - self._clock()
        if left_s <= 0:
            raise ApiError(Code.READ_TIMEOUT)
        try:
            data = self._receive(left_s)
        except TimeoutError:
            raise ApiError(Code.READ_TIMEOUT) from None
        if not data:
            raise ApiError(Code.BAD_REQUEST)
        if self._budget is not None:
            self._budget.take(len(data))
            self._held_bytes += len(data)
        return data
