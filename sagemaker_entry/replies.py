"""From body bytes to reply: parse, admit, run, word the answer.

Owns: the order of these, streaming, what a failure becomes before and after the first byte.
Must not know: sockets, the engine's protocol, body fields.
Invariant: the status line is not sent before the first event is known; a stream ends with its normal end, or
with one error event after which the body breaks off.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Final

from flask import Response
from gevent import GreenletExit

from sagemaker_entry import log, strict_json
from sagemaker_entry.admission import Admission, Outcome
from sagemaker_entry.body import LARGE_BODY_BYTES
from sagemaker_entry.dialects.choose import Dialect, DialectSetting, Route, choose, error_dialect
from sagemaker_entry.dialects.cohere_frames import LINES_TYPE
from sagemaker_entry.dialects.parse import parse
from sagemaker_entry.dialects.presenter import (
    JSON_TYPE,
    Parsed,
    ParseOptions,
    Presenter,
    error_body,
    status_of,
)
from sagemaker_entry.dialects.tgi_reply import chat_tokenize_body, tokenize_body
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft, Exchange, StreamBroken
from sagemaker_entry.generation import ChatPrompt, Event, ReplyContext, TextPrompt, TokenSpan
from sagemaker_entry.lines import Lines, count
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.prompts import chat_spans, text_spans
from sagemaker_entry.run import Run
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings
from sagemaker_entry.threads import beside

ID_PREFIX: Final = {Dialect.OPENAI_CHAT: "chatcmpl-", Dialect.OPENAI_COMPLETION: "cmpl-"}
METERING: Final = "X-Amzn-Inference-Metering"
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Headers = list[tuple[str, str]]


class Replies:
    """One per worker."""

    def __init__(
        self,
        settings: Settings,
        service: Service,
        metrics: Metrics,
        dialect: DialectSetting,
        fingerprint: str,
    ) -> None:
        self._settings = settings
        self._service = service
        self._metrics = metrics
        self._dialect = dialect
        self._fingerprint = fingerprint

    def generate(self, route: Route, body: bytes, exchange: Exchange) -> Response:
        """Return the whole answer, or a stream whose first event is known."""
        admission = Admission(self._metrics, self._settings.max_concurrent_requests)
        dialect: Dialect | None = None
        run: Run | None = None
        try:
            if len(body) > LARGE_BODY_BYTES:
                self._service.check_room()  # small ones are read first, to be refused in their own words
            dialect, parsed = self._understand(route, body, exchange)
            if isinstance(parsed, ApiError):
                raise parsed
            run = self._service.start(parsed.request, exchange)
            admission.accept()
            if parsed.request.stream:
                response = self._stream(parsed, dialect, run, admission, exchange)
            else:
                result = parsed.presenter.complete(run.result(), self._context(exchange, dialect))
                self.finish(run, admission, exchange, Outcome.COMPLETED)
                response = Response(result, 200, content_type=parsed.presenter.content_type)
            return self._metered(response, route, len(parsed.request.prompts))
        except ApiError as error:
            self.finish(run, admission, exchange, Outcome.FAILED)
            if dialect is None:
                raise  # worded by route
            return self.error(error, exchange, dialect)
        except ClientLeft:
            self.finish(run, admission, exchange, Outcome.CANCELLED)
            raise
        except BaseException:
            self.finish(run, admission, exchange, Outcome.FAILED)
            raise

    def lines(self, body: bytes, exchange: Exchange) -> Response:
        """Return an answer line for every line of `body`, as they are done."""
        together = min(self._service.running_limit(), self._settings.max_concurrent_requests)
        answers = Lines(self.line, body, exchange, max(1, together), self._settings.request_deadline_s)
        response = Response(answers, 200, content_type=LINES_TYPE)
        return self._metered(response, Route.INVOCATIONS, count(body))

    def line(self, line: bytes, exchange: Exchange) -> bytes:
        """Return the whole answer to one line, never a stream; raises ApiError, ClientLeft."""
        admission = Admission(self._metrics, self._settings.max_concurrent_requests)
        run: Run | None = None
        outcome = Outcome.FAILED
        try:
            dialect, parsed = self._understand(Route.INVOCATIONS, line, exchange)
            if isinstance(parsed, ApiError):
                raise parsed
            run = self._service.start(dataclasses.replace(parsed.request, stream=False), exchange)
            admission.accept()
            answer = parsed.presenter.complete(run.result(), self._context(exchange, dialect))
            outcome = Outcome.COMPLETED
            return answer
        except (ClientLeft, GreenletExit):  # the second: whoever writes the lines has given up
            outcome = Outcome.CANCELLED
            raise
        finally:
            self.finish(run, admission, exchange, outcome)

    def _metered(self, response: Response, route: Route, units: int) -> Response:
        """Return `response` with the units it costs, which are known before anything was generated."""
        if self._settings.metering == "inference" and route is Route.INVOCATIONS and units > 0:
            self._metrics.add("strongroom_metered_units_total", units)
            response.headers[METERING] = json.dumps({"Dimension": "inference.count", "ConsumedUnits": units})
        return response

    def tokenize(self, route: Route, body: bytes, exchange: Exchange) -> Response:
        """Return the tokens of a body's prompt, as TGI does."""
        _, parsed = self._understand(route, body, exchange)
        if isinstance(parsed, ApiError):
            raise parsed
        model, limits = self._service.model, self._service.limits()
        prompt = parsed.request.prompts[0]
        if isinstance(prompt, ChatPrompt):
            spans, text = chat_spans(model, prompt, limits)
            reply = beside(_chat_tokens, spans, text)
        elif isinstance(prompt, TextPrompt):
            reply = beside(_text_tokens, text_spans(model, prompt.text, limits))
        else:
            raise ApiError(Code.INVALID_TYPE, param="inputs", expected="a string")
        return Response(reply, 200, content_type=JSON_TYPE)

    def error(self, error: ApiError, exchange: Exchange, dialect: Dialect) -> Response:
        """Return `error` as a reply of `dialect`."""
        status, headers, body = worded(error, exchange, dialect)
        return Response(body, status, headers)

    def refuse(self, route: Route, exchange: Exchange, full_s: int) -> tuple[int, Headers, bytes]:
        """Return status, headers and body for a request that a full engine would refuse.

        It is read to the end: what is wrong with the request itself is said first, and all in its dialect.
        """
        dialect = error_dialect(route, self._dialect)
        error = ApiError(Code.OVERLOADED, retry_after_s=full_s)
        try:
            body = exchange.body.read()
            self._metrics.add("strongroom_requests_rejected_total")
            dialect, parsed = self._understand(route, body, exchange)
            if isinstance(parsed, ApiError):
                error = parsed
        except ApiError as unread:
            # Whether a session may be opened is not for a full engine to say.
            if unread.code is not Code.SESSIONS_OFF or self._settings.sessions == "off":
                error = unread
        return worded(error, exchange, dialect)

    def _stream(
        self, parsed: Parsed, dialect: Dialect, run: Run, admission: Admission, exchange: Exchange
    ) -> Response:
        events = run.events()
        first = next(events)  # an error up to here still has a status of its own
        chunks = parsed.presenter.open(self._context(exchange, dialect)) + parsed.presenter.event(first)
        stream = Stream(self, parsed.presenter, run, events, chunks, admission, exchange)
        return Response(stream, 200, STREAM_HEADERS, content_type=parsed.presenter.stream_type)

    def _understand(self, route: Route, body: bytes, exchange: Exchange) -> tuple[Dialect, Parsed | ApiError]:
        """Return the dialect of `body` and what it asks for, or why it is refused in that dialect.

        Raises ApiError where no dialect is known. Large bodies are read in a thread, off the event loop.
        """
        arguments = (route, body, self._dialect, self._options(exchange))

        def read() -> tuple[Dialect, Parsed | ApiError]:
            return beside(_read, *arguments) if len(body) > LARGE_BODY_BYTES else _read(*arguments)

        dialect, found = read()
        if isinstance(found, ApiError) and found.code is Code.LOADING:
            self._service.await_text()  # tools are read by the model's own format of calls
            return read()
        return dialect, found

    def _options(self, exchange: Exchange) -> ParseOptions:
        refuse = self._settings.unknown_fields == "refuse"
        return ParseOptions(
            self._service.limits(),
            "refuse" if refuse else "ignore",
            forwarded_stream=exchange.forwarded_stream,
            tool_format=self._service.tool_format,
        )

    def _context(self, exchange: Exchange, dialect: Dialect) -> ReplyContext:
        return ReplyContext(
            ID_PREFIX.get(dialect, "") + exchange.id,
            int(time.time()),
            self._settings.name,
            self._fingerprint,
            self._service.special_ids,
        )

    def finish(self, run: Run | None, admission: Admission, exchange: Exchange, outcome: Outcome) -> None:
        """Close the books of one request."""
        if run is not None:
            run.close()
            if outcome is not Outcome.COMPLETED:
                self._metrics.add("finished abort" if outcome is Outcome.CANCELLED else "finished error")
            self._measure(exchange)
        admission.close(outcome)

    def _measure(self, exchange: Exchange) -> None:
        total_s = time.monotonic() - exchange.started_s
        self._metrics.observe("vllm:e2e_request_latency_seconds", total_s)
        counts = exchange.counts
        if counts.first_token_s is not None and counts.completion_tokens > 1:
            per_token_s = (total_s - counts.first_token_s) / (counts.completion_tokens - 1)
            self._metrics.observe("vllm:request_time_per_output_token_seconds", per_token_s)

    @property
    def breaks_off(self) -> bool:
        """True when a failed stream must not end normally."""
        return self._settings.stream_error == "abort"


class Stream:
    """The chunks of a streamed reply, one SSE event each; `close` is always called by the server."""

    def __init__(
        self,
        replies: Replies,
        presenter: Presenter,
        run: Run,
        events: Iterator[Event],
        ready: list[bytes],
        admission: Admission,
        exchange: Exchange,
    ) -> None:
        self._replies = replies
        self._run = run
        self._admission = admission
        self._exchange = exchange
        self._outcome: Outcome | None = None  # None until the end: a close before it is a client that left
        self._closed = False
        self._chunks = self._generate(presenter, events, ready)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        """End the run and close its books, once."""
        if not self._closed:
            self._closed = True
            self._chunks.close()
            outcome = self._outcome or Outcome.CANCELLED
            self._replies.finish(self._run, self._admission, self._exchange, outcome)

    def _generate(
        self, presenter: Presenter, events: Iterator[Event], ready: list[bytes]
    ) -> Generator[bytes, None, None]:
        try:
            yield from ready
            for event in events:
                yield from presenter.event(event)
            yield from presenter.close()
            self._outcome = Outcome.COMPLETED
            return
        except ClientLeft:
            self._outcome = Outcome.CANCELLED
            raise
        except ApiError as caught:
            error = caught
        except Exception:  # noqa: BLE001  a failed stream must end with an error event, whatever failed
            log.write("error", "stream_failed", id=self._exchange.id, kind=log.exception_name())
            error = ApiError(Code.INTERNAL)
        self._outcome = Outcome.FAILED
        self._exchange.error_code = error.code.value
        yield presenter.stream_error(error)
        if self._replies.breaks_off:
            raise StreamBroken


def worded(error: ApiError, exchange: Exchange, dialect: Dialect) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of `error` in `dialect`; the exchange learns its code."""
    exchange.error_code = error.code.value
    body, content_type = error_body(dialect, error, exchange.public_id)
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
    if error.retry_after_s is not None:
        headers.append(("Retry-After", str(error.retry_after_s)))
    return status_of(dialect, error), headers, body


def _read(
    route: Route, body: bytes, setting: DialectSetting, options: ParseOptions
) -> tuple[Dialect, Parsed | ApiError]:
    value = strict_json.loads(body)
    dialect = choose(route, value, setting)
    try:
        return dialect, parse(dialect, route, value, options)
    except ApiError as error:
        return dialect, error


def _chat_tokens(spans: Sequence[Any], text: str) -> bytes:
    return chat_tokenize_body([_span(span) for span in spans], text)


def _text_tokens(spans: Sequence[Any]) -> bytes:
    return tokenize_body([_span(span) for span in spans])


def _span(span: Any) -> TokenSpan:
    return TokenSpan(span.id, span.text, span.start, span.stop)
