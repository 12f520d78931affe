"""The HTTP side of one caller: requests in, answers out.

Owns: reading a request within its limits, writing an answer or a stream of pieces, leaving a connection so
that the caller still reads the answer. Must not know: routes, SageMaker's rules, the container.
Invariant: a request body above the limit is never held, nothing a caller sent is echoed or printed, and after
an answer to a body that was not read the connection closes.
"""

from __future__ import annotations

import http
import re
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Final, Protocol

from infra.emulator.errors import ServiceError, body_too_large, validation_error
from infra.emulator.upstream import ClientGone, Deadline

IDLE_S: Final = 30.0  # a connection without a request, or a caller that does not read
READ_BYTES: Final = 64 * 1024
LINE_BYTES: Final = 1024  # longest chunk size or trailer line of a request
TRAILER_LINES: Final = 64
# What is read and thrown away after an early answer: a caller still sending would lose the answer to a reset.
LINGER_BYTES: Final = 64 * 1024 * 1024
LINGER_S: Final = 3.0

_PHRASES: Final[dict[int, str]] = {status.value: status.phrase for status in http.HTTPStatus}
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")

Pairs = Sequence[tuple[str, str]]


class Service(Protocol):
    """What answers requests."""

    def serve(self, caller: Caller) -> None:
        """Answer the request that `caller` has brought."""


class Caller(BaseHTTPRequestHandler):
    """One connection of a caller, request after request.

    A service reads `command`, `path`, `headers` and `read_body`, then calls `answer` once, or `start`,
    `write` and `end` (or `abort`). Writing raises ClientGone.
    """

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True

    service: Service  # set by the server's subclass

    def setup(self) -> None:
        super().setup()
        self.started = False  # an answer has begun
        self._chunked = False
        self._body_pending = False
        self._continue_due = False

    def do_GET(self) -> None:
        """Serve a request without a body."""
        self._serve()

    def do_POST(self) -> None:
        """Serve a request with a body."""
        self._serve()

    def read_body(self, limit_bytes: int, deadline: Deadline) -> bytes:
        """Return the request's body.

        Raises ServiceError 413 above `limit_bytes`, before reading where the length is announced; 408 when
        it does not arrive in time; ClientGone when it ends early.
        """
        length = self._announced_length()
        if length is not None and length > limit_bytes:
            raise body_too_large(limit_bytes)
        if self._continue_due:
            self._continue_due = False
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if length is None:
                body = self._read_chunked(limit_bytes, deadline)
            else:
                body = self._read_exactly(length, deadline)
        except TimeoutError as error:
            raise ServiceError(408, "RequestTimeoutException", "the body did not arrive in time") from error
        except OSError as error:
            raise ClientGone from error
        self._body_pending = False
        self.connection.settimeout(IDLE_S)
        return body

    def answer(self, status: int, headers: Pairs, body: bytes) -> None:
        """Send a whole answer."""
        self.start(status, [*headers, ("Content-Length", str(len(body)))])
        if body:
            self._send(body)
        if self._body_pending:
            self._linger()

    def start(self, status: int, headers: Pairs) -> None:
        """Send the head of an answer; without a Content-Length among `headers` its body is chunked."""
        self.started = True
        self._chunked = not any(name.lower() == "content-length" for name, _ in headers)
        phrase = _PHRASES.get(status, "")
        lines = [f"HTTP/1.1 {status} {phrase}", f"x-amzn-RequestId: {uuid.uuid4()}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if self._chunked:
            lines.append("Transfer-Encoding: chunked")
        if self._body_pending or self.close_connection:
            self.close_connection = True
            lines.append("Connection: close")
        self._send("\r\n".join((*lines, "", "")).encode("latin-1"))

    def write(self, piece: bytes) -> None:
        """Send a piece of the body at once."""
        if self._chunked and piece:
            self._send(b"%x\r\n%b\r\n" % (len(piece), piece))
        elif piece:
            self._send(piece)

    def end(self) -> None:
        """End a chunked body properly."""
        if self._chunked:
            self._send(b"0\r\n\r\n")

    def abort(self) -> None:
        """Close the connection in the middle of an answer, so that the caller sees it is not whole."""
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        """Leave the interim answer until the request has been found good."""
        self._continue_due = True
        return True

    def send_error(self, code: int, *_: str | None, **__: str | None) -> None:
        """Answer what cannot be parsed with a status alone: the library's texts quote the request."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        error = ServiceError(code, None, "the request is malformed")
        try:
            self.answer(code, error.headers(), error.body())
        except ClientGone:
            self.abort()

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: paths and request lines belong to the caller; the journal has what may be kept."""

    def _serve(self) -> None:
        self.started = False
        codings, lengths = self.headers.get_all("Transfer-Encoding"), self.headers.get_all("Content-Length")
        self._body_pending = bool(codings) or (lengths or ["0"]) != ["0"]
        if self.request_version != "HTTP/1.1":
            self.send_error(505)
            return
        self.service.serve(self)
        if self._body_pending:
            self.close_connection = True

    def _announced_length(self) -> int | None:
        """Return the body's length, None when chunked; raises ServiceError (400) for anything unclear."""
        codings = self.headers.get_all("Transfer-Encoding") or []
        lengths = set(self.headers.get_all("Content-Length") or [])
        if codings:
            if [coding.lower() for coding in codings] != ["chunked"] or lengths:
                raise validation_error("the body has no single framing")
            return None
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", text) for text in lengths):
            raise validation_error("the content length is malformed")
        return int(lengths.pop()) if lengths else 0

    def _read_exactly(self, count: int, deadline: Deadline) -> bytes:
        body = bytearray()
        while len(body) < count:
            self.connection.settimeout(_bounded(deadline))
            piece = self.rfile.read1(min(READ_BYTES, count - len(body)))
            if not piece:
                raise ConnectionError
            body += piece
        return bytes(body)

    def _read_chunked(self, limit_bytes: int, deadline: Deadline) -> bytes:
        body = bytearray()
        while True:
            match = _CHUNK_SIZE.fullmatch(self._read_line(deadline))
            if match is None:
                raise validation_error("a chunk size is malformed")
            count = int(match[1], 16)
            if len(body) + count > limit_bytes:
                raise body_too_large(limit_bytes)
            if count == 0:
                break
            body += self._read_exactly(count, deadline)
            if self._read_line(deadline) != b"\r\n":
                raise validation_error("a chunk is longer than its size")
        for _ in range(TRAILER_LINES):
            if self._read_line(deadline) == b"\r\n":
                return bytes(body)
        raise validation_error("the body has too many trailers")

    def _read_line(self, deadline: Deadline) -> bytes:
        self.connection.settimeout(_bounded(deadline))
        line = self.rfile.readline(LINE_BYTES)
        if not line:
            raise ConnectionError
        return line

    def _send(self, data: bytes) -> None:
        try:
            self.connection.sendall(data)
        except OSError as error:
            self.close_connection = True
            raise ClientGone from error

    def _linger(self) -> None:
        """Let the caller read the answer: end our side, then throw away what it still sends, for a while."""
        end_s = time.monotonic() + LINGER_S
        left_bytes = LINGER_BYTES
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while left_bytes > 0 and (left_s := end_s - time.monotonic()) > 0:
                self.connection.settimeout(left_s)
                count = len(self.connection.recv(READ_BYTES))
                if count == 0:
                    return
                left_bytes -= count
        except OSError:
            return  # the caller has closed first, which is what is waited for


def header_values(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers by lower-case name, values of repeated ones joined as they are signed."""
    joined: dict[str, str] = {}
    for name, value in pairs:
        key = name.lower()
        joined[key] = f"{joined[key]},{value}" if key in joined else value
    return joined


def _bounded(deadline: Deadline) -> float:
    return max(min(deadline.left_s(), IDLE_S), 0.001)
