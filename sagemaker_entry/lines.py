"""A body of JSON lines: each line is a request of its own and is answered by one line, in order.

Owns: splitting, how many lines run at once, what a line's failure becomes, giving up on an overloaded engine.
Must not know: sockets, dialects, generation: it is given a function that answers one line.
Invariant: every line that is not blank has exactly one answer line, an answer or `{"error": {...}}`; a bad
    line never fails another. A body that cannot be finished (the server shuts down) breaks off, so that the
    platform sees a failure and sends it again.

    in    {"prompt": "a"}      {"prompt": 3}                       (blank)    {"inputs": "b"}
    out   {"object": ...}      {"error": {"param": "prompt", ...}}            [{"generated_text": ...}]
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import gevent

from sagemaker_entry import log
from sagemaker_entry.dialects.choose import Dialect
from sagemaker_entry.dialects.presenter import error_body
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft, Exchange, StreamBroken
from sagemaker_entry.lifetime import Lifetime

# Answered 429 or 503 these lines wait and try again: nobody else can, for the line has no status of its own.
_PASSING: Final = frozenset({Code.OVERLOADED, Code.ENGINE_DOWN, Code.LOADING})
RETRY_S: Final = 0.5
BLANK: Final = b" \t\r"

AnswerLine = Callable[[bytes, Exchange], bytes]


def split(body: bytes) -> Iterator[bytes]:
    """Yield the lines of `body` that are not blank, without holding them all."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        line = body[start:end].strip(BLANK)
        if line:
            yield line
        start = end + 1


def count(body: bytes) -> int:
    """Return how many lines of `body` are not blank."""
    return sum(1 for _ in split(body))


class Lines:
    """The answer lines of `body`; `close` is always called by the server.

    `answer` raises ApiError or ClientLeft. At most `together` lines run at once, each for at most `line_s`.
    """

    def __init__(
        self, answer: AnswerLine, body: bytes, exchange: Exchange, together: int, line_s: float
    ) -> None:
        self._answer = answer
        self._body = body
        self._exchange = exchange
        self._together = together
        self._line_s = line_s
        self._waiting: deque[gevent.Greenlet] = deque()
        self._lifetimes: set[Lifetime] = set()
        self._chunks = self._generate()
        exchange.lifetime.on_end(self._end)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        """Stop whatever still runs; idempotent."""
        self._exchange.lifetime.on_end(None)
        gevent.killall(list(self._waiting), block=True)
        self._waiting.clear()

    def _generate(self) -> Iterator[bytes]:
        for line in split(self._body):
            if len(self._waiting) >= self._together:
                yield self._first()
            self._waiting.append(gevent.spawn(self._outcome, line))
        while self._waiting:
            yield self._first()

    def _first(self) -> bytes:
        outcome = self._waiting[0].get()
        self._waiting.popleft()
        if isinstance(outcome, bytes):
            return outcome + b"\n"
        raise outcome

    def _outcome(self, line: bytes) -> bytes | Exception:
        """Return the answer to a line; an exception ends the whole body, where it is written."""
        try:
            return self._answered(line)
        except ApiError as error:
            if error.code is Code.DRAINING:
                return StreamBroken()
            return error_body(Dialect.OPENAI_CHAT, error, self._exchange.public_id)[0]
        except ClientLeft as left:
            return left
        except Exception:  # noqa: BLE001  whatever a line does, the others are answered
            log.write("error", "line_failed", id=self._exchange.id, kind=log.exception_name())
            return error_body(Dialect.OPENAI_CHAT, ApiError(Code.INTERNAL), self._exchange.public_id)[0]

    def _answered(self, line: bytes) -> bytes:
        until_s = time.monotonic() + self._line_s
        lifetime = Lifetime()
        self._lifetimes.add(lifetime)
        try:
            while True:
                if (reason := self._exchange.lifetime.reason) is not None:
                    lifetime.end(reason)
                part = self._exchange.part(lifetime)
                try:
                    return self._answer(line, part)
                except ApiError as error:
                    if error.code not in _PASSING or time.monotonic() + RETRY_S > until_s:
                        raise
                finally:
                    self._exchange.counts.add(part.counts)
                gevent.sleep(RETRY_S)
        finally:
            self._lifetimes.discard(lifetime)

    def _end(self) -> None:
        reason = self._exchange.lifetime.reason
        for lifetime in list(self._lifetimes):
            if reason is not None:
                lifetime.end(reason)
