"""One client connection: requests in, replies out, every wait with a deadline.

Owns: the order of things on a connection, parser errors as replies, the log line of an exchange.
Must not know: routes, dialects, generation: it calls a WSGI application.
Invariant: whatever bytes arrive, the answer comes from the error table or the connection is closed; bytes of
one request never reach the next, because a connection whose body was not read to its end is not used again.
"""

from __future__ import annotations

import enum
import re
import socket
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Final, Protocol

import gevent
from gunicorn import util
from gunicorn.http import errors as http_errors
from gunicorn.http import wsgi
from gunicorn.http.body import Body, ChunkedReader, LengthReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import SocketUnreader

from sagemaker_entry import log
from sagemaker_entry.body import BodyBudget, BodyLimits, BodyReader
from sagemaker_entry.dialects.choose import Dialect
from sagemaker_entry.dialects.presenter import error_body
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ENVIRON_KEY, ClientLeft, Exchange, StreamBroken
from sagemaker_entry.lifetime import ClientWatch, End, Lifetime
from sagemaker_entry.metrics import Metrics

HEADER_S: Final = 5.0
IDLE_S: Final = 30.0
WRITE_S: Final = 30.0
LINGER_S: Final = 2.0  # how long a refused client may go on sending before it is cut off
HEADERS_LIMIT_BYTES: Final = 64 * 1024
READ_BYTES: Final = 64 * 1024

FORWARDED_STREAM: Final = "InvokeEndpointWithResponseStream"

# A request line, or as much of one as has come: printable ASCII up to CR LF, and no other way to end it.
_REQUEST_LINE = re.compile(rb"[ -~]*+(?:\r\n|\r?\Z)")


class Phase(enum.IntEnum):
    """What a connection waits for; lower values are given up first when there are too many."""

    IDLE = 0
    HEADER = 1
    BODY = 2
    RUNNING = 3


class Host(Protocol):
    """What a connection needs of its worker."""

    cfg: Any
    body_limits: BodyLimits
    body_budget: BodyBudget
    metrics: Metrics
    watch: ClientWatch
    exchanges: set[Exchange]
    wsgi: Callable[..., Iterable[bytes]]

    @property
    def draining(self) -> bool: ...


class HttpRequest(Request):  # type: ignore[misc]  # gunicorn has no types
    """The library's request parser with our bound on all headers together and no body without a length."""

    @property
    def max_buffer_headers(self) -> int:
        return HEADERS_LIMIT_BYTES

    @max_buffer_headers.setter
    def max_buffer_headers(self, value: int) -> None:
        """The library computes 800 KB here; ours stays."""

    body: Body

    def set_body_reader(self) -> None:
        super().set_body_reader()
        if not isinstance(self.body.reader, ChunkedReader | LengthReader):
            self.body = Body(LengthReader(self.unreader, 0))

    @property
    def length_bytes(self) -> int | None:
        """Declared body length, None for a chunked body."""
        reader = self.body.reader
        return reader.length if isinstance(reader, LengthReader) else None

    def header(self, name: str) -> str | None:
        """Return the value of the first header called `name` (upper case)."""
        return next((value for key, value in self.headers if key == name), None)


class Joining:
    """A socket that keeps the first piece for the second: headers and body leave in one packet.

    Two would wake the client twice, and cost this process a second call.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._kept: bytes | None = None
        self._first = True

    def sendall(self, data: bytes) -> None:
        if self._first:
            self._first, self._kept = False, data
            return
        kept, self._kept = self._kept, None
        self._sock.sendall(data if kept is None else kept + data)

    def flush(self) -> None:
        """Send what is kept: nothing follows it."""
        if self._kept is not None:
            self.sendall(b"")


class Reply(wsgi.Response):  # type: ignore[misc]
    """The library's response without the `Server` header.

    Whether the connection goes on is decided once, with the headers that say so: a client that was told it
    may send again is not cut off because a drain began meanwhile.
    """

    exchange: Exchange

    def default_headers(self) -> list[str]:
        if not self.exchange.body.consumed or self.exchange.draining():
            self.force_close()
        return [line for line in super().default_headers() if not line.startswith("Server:")]

    def close(self) -> None:
        super().close()
        self.sock.flush()


class Connection:
    """Serves one accepted socket until it closes."""

    def __init__(self, host: Host, sock: Any, address: Any, listener_name: Any) -> None:
        self._host = host
        self._sock = sock
        self._address = address
        self._listener_name = listener_name
        self._unreader = SocketUnreader(sock, READ_BYTES)
        self._requests = 0
        self._phase = Phase.IDLE
        self._body: BodyReader | None = None  # of the exchange being served

    @property
    def phase(self) -> Phase:
        """What the connection waits for now."""
        if self._body is not None:
            return Phase.RUNNING if self._body.consumed else Phase.BODY
        return self._phase

    def abort(self) -> None:
        """Break the connection off from outside; whoever waits on it wakes up."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # already gone

    def serve(self) -> None:
        """Serve requests until either side closes."""
        try:
            while self._serve_one():
                self._phase = Phase.IDLE
        except (OSError, http_errors.NoMoreData, StopIteration):
            return  # the client left or stalled; there is nobody to tell
        finally:
            util.close(self._sock)

    def _serve_one(self) -> bool:
        """Serve one request; False when the connection is finished."""
        if not self._wait_for_request():
            return False
        self._phase = Phase.HEADER
        try:
            request = self._parse() if self._check_start() else self._parse_as_it_comes()
            self._check(request)
        except http_errors.ParseException as error:
            self._refuse(parse_error(error))
            return False
        except ApiError as error:
            self._refuse(error)
            return False
        return self._exchange(request)

    def _wait_for_request(self) -> bool:
        self._requests += 1
        buffered = self._unreader.take_buffered()
        if not buffered:
            self._sock.settimeout(IDLE_S)
            buffered = self._sock.recv(READ_BYTES)
        self._unreader.unread(buffered)
        return bool(buffered)

    def _check_start(self) -> bool:
        """Refuse at once what can never become a request; the parser would wait for more of it.

        Returns whether the headers have come whole, as they mostly do: then nothing is waited for.
        """
        start: bytes = self._unreader.take_buffered()
        self._unreader.unread(start)
        if _REQUEST_LINE.match(start) is None:
            raise ApiError(Code.BAD_REQUEST)
        return b"\r\n\r\n" in start

    def _parse_as_it_comes(self) -> HttpRequest:
        """Parse headers of which some are still to come, all of them by one deadline."""
        with gevent.Timeout(HEADER_S, TimeoutError):
            self._sock.settimeout(None)
            return self._parse()

    def _parse(self) -> HttpRequest:
        return HttpRequest(self._host.cfg, self._unreader, self._address, self._requests)

    def _check(self, request: HttpRequest) -> None:
        if request.version >= (1, 1) and request.header("HOST") is None:
            raise ApiError(Code.BAD_REQUEST)

    def _exchange(self, request: HttpRequest) -> bool:
        fd = self._sock.fileno()
        lifetime = Lifetime()
        body = BodyReader(
            self._receive,
            self._unreader.unread,
            request.length_bytes,
            self._host.body_limits,
            self._continue if request._expected_100_continue else None,
            budget=self._host.body_budget,
        )
        request._expected_100_continue = False  # sent when the body is wanted, not before
        exchange = Exchange(
            request.method,
            body,
            lifetime,
            lambda: self._host.draining,
            client_id=request.header("X-AMZN-SAGEMAKER-INFERENCE-ID"),
            forwarded_stream=request.header("X-AMZN-SAGEMAKER-FORWARDED-API") == FORWARDED_STREAM,
        )
        reply, environ = wsgi.create(
            request, self._sock, self._address, self._listener_name, self._host.cfg, response_class=Reply
        )
        reply.exchange = exchange
        reply.sock = Joining(self._sock)
        environ[ENVIRON_KEY] = exchange
        environ["wsgi.input"] = None  # bodies are read through the exchange only
        self._body = body
        self._host.exchanges.add(exchange)
        self._host.watch.add(fd, lifetime)
        try:
            return self._answer(reply, environ, exchange)
        finally:
            self._body = None
            body.release()
            self._host.watch.remove(fd)
            self._host.exchanges.discard(exchange)
            self._log(reply, exchange)

    def _answer(self, reply: Reply, environ: dict[str, Any], exchange: Exchange) -> bool:
        chunks: Any = None
        try:
            chunks = self._host.wsgi(environ, reply.start_response)
            self._sock.settimeout(WRITE_S)
            for chunk in chunks:
                if chunk:
                    reply.write(chunk)
            reply.close()
        except (ClientLeft, OSError):
            exchange.lifetime.end(End.CLIENT_LEFT)
            return False
        except StreamBroken:
            return False
        except Exception:  # noqa: BLE001  the last line of defence: no traceback, one error, closed
            log.write("error", "application_failed", id=exchange.id, kind=log.exception_name())
            if not reply.headers_sent:
                self._refuse(ApiError(Code.INTERNAL))
            return False
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        if not exchange.body.consumed:
            self._linger()
        return not reply.should_close()

    def _receive(self, timeout_s: float) -> bytes:
        buffered: bytes = self._unreader.take_buffered()
        if buffered:
            return buffered
        self._sock.settimeout(timeout_s)
        data: bytes = self._sock.recv(READ_BYTES)
        return data

    def _continue(self) -> None:
        self._sock.settimeout(WRITE_S)
        self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, error: ApiError) -> None:
        """Answer a request that was not understood, then close."""
        body, content_type = error_body(Dialect.OPENAI_CHAT, error, "")
        head = (
            f"HTTP/1.1 {error.status} {reason_phrase(error.status)}\r\n"
            f"Connection: close\r\nContent-Type: {content_type}\r\n"
            f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._host.metrics.responded("other", error.status)
        log.write("info", "request_refused", status=error.status, code=error.code.value)
        try:
            self._sock.settimeout(WRITE_S)
            self._sock.sendall(head.encode() + body)
        except OSError:
            return
        self._linger()

    def _linger(self) -> None:
        """Let the client read the answer before unread bytes turn the close into a reset (RFC 9112 9.6)."""
        util.close_graceful(self._sock, LINGER_S, self._host.body_limits.size_bytes)

    def _log(self, reply: Reply, exchange: Exchange) -> None:
        status = reply.status_code if reply.status else 0
        if status:
            self._host.metrics.responded(exchange.route, status)
        counts = exchange.counts
        log.write(
            "debug" if exchange.route in ("/ping", "/metrics", "/health") else "info",
            "request",
            id=exchange.id,
            client_id=exchange.hashed_client_id,
            method=exchange.method if exchange.method in ("GET", "POST", "HEAD") else "other",
            route=exchange.route,
            status=status,
            code=exchange.error_code,
            left=exchange.lifetime.reason,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            first_token_s=None if counts.first_token_s is None else round(counts.first_token_s, 4),
            total_s=round(time.monotonic() - exchange.started_s, 4),
        )


def parse_error(error: http_errors.ParseException) -> ApiError:
    """Return the client's error for a request the parser refused; the parser's own text is dropped."""
    if isinstance(error, http_errors.LimitRequestLine | http_errors.LimitRequestHeaders):
        return ApiError(Code.HEADERS_TOO_LARGE)
    if isinstance(error, http_errors.UnsupportedTransferCoding):
        return ApiError(Code.TRANSFER_CODING)
    if isinstance(error, http_errors.ExpectationFailed):
        return ApiError(Code.EXPECTATION)
    if isinstance(error, http_errors.InvalidHeader) and error.hdr == "CONTENT-TYPE":
        return ApiError(Code.MEDIA_TYPE)  # sent twice
    return ApiError(Code.BAD_REQUEST)


def reason_phrase(status: int) -> str:
    """Return the reason phrase of `status`."""
    return HTTPStatus(status).phrase
