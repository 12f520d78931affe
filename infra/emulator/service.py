"""The runtime service: which route does what, from the caller's bytes to the container's and back.

Owns: routes, the order of checks, how a container's end becomes an answer. Must not know: socket details
(Caller and Exchange have them), where containers come from (the registry has them).
Invariant: every request ends in exactly one of a whole answer, an error answer, a stream with its end or its
exception message, an aborted pass-through, or the caller's own departure, and in one journal entry.

Order of checks: route, signature present, endpoint, headers, size, signature (strict), container.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from infra.emulator import accepting, eventstream, headers, sigv4, tokens
from infra.emulator.caller import Caller, header_values
from infra.emulator.control import BODY_BYTES, CONTENT_TYPE, TARGET, Control
from infra.emulator.errors import (
    ACCOUNT,
    BROKEN,
    PLATFORM_FAILED,
    TIMED_OUT,
    TOO_LARGE,
    Failure,
    ServiceError,
    endpoint_not_found,
    model_error,
    validation_error,
)
from infra.emulator.http1 import Head
from infra.emulator.journal import Entry, Journal
from infra.emulator.queueing import AsyncQueue
from infra.emulator.registry import Endpoint, Registry, check_name
from infra.emulator.sigv4 import Keys, SignedRequest
from infra.emulator.splitting import Split
from infra.emulator.upstream import (
    Address,
    ClientGone,
    Clock,
    Deadline,
    DeadlinePassed,
    Exchange,
    ExchangeFailed,
    UpstreamBroken,
    host_header,
)

ERROR_BYTES: Final = 16 * 1024  # read of a failed container's body: several times what an error may show

INVOCATIONS: Final = "/invocations"
CHAT_COMPLETIONS: Final = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the platform allows a request."""

    body_bytes: int = 6_291_456  # `BodyBlob` of the service model, both ways
    response_s: float = 60.0  # a whole answer
    stream_s: float = 480.0  # a whole stream


@dataclass(frozen=True, slots=True)
class Options:
    """How an emulator behaves; `keys` are dummies that callers sign with and `strict` verifies."""

    keys: Keys
    region: str
    strict: bool = False
    split: Split = field(default_factory=Split)
    limits: Limits = field(default_factory=Limits)
    fail_after_parts: int | None = None  # then the platform itself fails a stream, to see what a client does
    clock: Clock = time.monotonic
    wall_clock: Clock = time.time


@dataclass(slots=True)
class Call:
    """One admitted request on its way: to whom, with which headers, until when."""

    caller: Caller
    entry: Entry
    endpoint: Endpoint
    address: Address
    passed: headers.Pairs = field(repr=False)
    deadline: Deadline


class PlatformFailed(Exception):
    """A stream that was to fail as the platform's own doing has come to that point."""


Handler = Callable[[Caller, Entry, "re.Match[str]"], None]


class RuntimeService:
    """Answers callers from the containers of `registry`, noting each request in `journal`."""

    def __init__(
        self,
        registry: Registry,
        journal: Journal,
        options: Options,
        queue: AsyncQueue | None = None,
        control: Control | None = None,
    ) -> None:
        """Without `queue` and `control` there is no store: no asynchronous calls and no batch jobs."""
        self._registry = registry
        self._queue = queue
        self._control = control
        self._journal = journal
        self._options = options
        endpoint = r"/endpoints/(?P<endpoint>[^/]+)"
        self._routes: list[tuple[str, str, re.Pattern[str], Handler]] = [
            ("invoke", "POST", re.compile(rf"{endpoint}/invocations"), self._invoke),
            ("stream", "POST", re.compile(rf"{endpoint}/invocations-response-stream"), self._stream),
            (
                "openai",
                "POST",
                re.compile(
                    rf"{endpoint}(?:/inference-components/(?P<component>[^/]+))?/openai{CHAT_COMPLETIONS}"
                ),
                self._openai,
            ),
            ("local", "GET", re.compile(r"/_local/(?P<view>state|journal|notifications)"), self._local),
            ("async", "POST", re.compile(rf"{endpoint}/async-invocations"), self._asynchronous),
            ("control", "POST", re.compile("/"), self._controlled),
        ]

    def serve(self, caller: Caller) -> None:
        """Answer one request."""
        entry = Entry(request_headers=headers.names(caller.headers))
        start_s = self._options.clock()
        try:
            name, handler, match = self._find_route(caller)
            entry.route = name
            handler(caller, entry, match)
        except ServiceError as error:
            entry.outcome = error.kind or f"http_{error.status}"
            entry.status = error.status
            try:
                caller.answer(error.status, error.headers(), error.body())
            except ClientGone:
                entry.outcome = "client_gone"
        except ClientGone:
            entry.outcome = "client_gone"
            caller.abort()
        except BaseException:
            entry.outcome = "emulator_fault"
            caller.abort()
            raise
        finally:
            entry.duration_s = round(self._options.clock() - start_s, 6)
            if entry.route != "local":
                self._journal.add(entry)

    def _find_route(self, caller: Caller) -> tuple[str, Handler, re.Match[str]]:
        path = caller.path.partition("?")[0]
        status = 404
        for name, method, pattern, handler in self._routes:
            match = pattern.fullmatch(path)
            if match and method == caller.command:
                return name, handler, match
            status = 405 if match else status
        raise ServiceError(status, "UnknownOperationException", "there is no such operation")

    def _invoke(self, caller: Caller, entry: Entry, match: re.Match[str]) -> None:
        sigv4.check_presence(caller.headers.get("Authorization"))
        call = self._admit(caller, entry, match, stream=False)
        body = self._read_body(call)
        try:
            with Exchange(call.address, call.deadline, caller.connection) as exchange:
                call.passed.append((headers.FORWARDED_API, "InvokeEndpoint"))
                head = self._send(exchange, call, INVOCATIONS, body)
                content = self._collect(exchange, call, self._options.limits.body_bytes)
        except (DeadlinePassed, UpstreamBroken) as error:
            raise self._failed(call, error) from error
        entry.status, entry.outcome = 200, "answered"
        caller.answer(200, headers.returned(head, call.endpoint.variant, stream=False), content)

    def _stream(self, caller: Caller, entry: Entry, match: re.Match[str]) -> None:
        sigv4.check_presence(caller.headers.get("Authorization"))
        call = self._admit(caller, entry, match, stream=True)
        body = self._read_body(call)
        try:
            with Exchange(call.address, call.deadline, caller.connection) as exchange:
                call.passed.append((headers.FORWARDED_API, "InvokeEndpointWithResponseStream"))
                head = self._send(exchange, call, INVOCATIONS, body)
                shown = headers.returned(head, call.endpoint.variant, stream=True)
                caller.start(200, [("Content-Type", eventstream.CONTENT_TYPE), *shown])
                entry.status = 200
                self._frame(exchange, call)
        except (DeadlinePassed, UpstreamBroken) as error:
            if not caller.started:
                raise self._failed(call, error) from error
            caller.write(_stream_failure(error))
            entry.outcome = "timed_out" if isinstance(error, DeadlinePassed) else "broken"
        except PlatformFailed:
            caller.write(eventstream.internal_stream_failure(PLATFORM_FAILED))
            entry.outcome = "platform_failed"
        caller.end()

    def _frame(self, exchange: Exchange, call: Call) -> None:
        """Send the container's body as parts, each as soon as it is here."""
        cut = self._options.split.cutter()
        for piece in exchange.pieces():
            call.entry.response_bytes += len(piece)
            for part in cut(piece):
                call.caller.write(eventstream.payload_part(part))
                call.entry.parts += 1
                if call.entry.parts == self._options.fail_after_parts:
                    raise PlatformFailed
        call.entry.outcome = "streamed"

    def _openai(self, caller: Caller, entry: Entry, match: re.Match[str]) -> None:
        keys = self._options.keys if self._options.strict else None
        tokens.check(caller.headers.get("Authorization"), self._options.wall_clock(), keys)
        call = self._admit(caller, entry, match, stream=False)
        body = self._read_body(call, signed=False)
        try:
            with Exchange(call.address, call.deadline, caller.connection) as exchange:
                exchange.send(CHAT_COMPLETIONS, _container_headers(call, body), body)
                head = exchange.head()
                entry.container_status = head.status
                if (head.get("Content-Type") or "").lower().startswith("text/event-stream"):
                    call.deadline.extend_to(self._options.limits.stream_s)
                caller.start(head.status, headers.unchanged(head.headers))
                entry.status = head.status
                for piece in exchange.pieces():
                    entry.response_bytes += len(piece)
                    caller.write(piece)
                    entry.parts += 1
        except (DeadlinePassed, UpstreamBroken) as error:
            if not caller.started:
                raise self._failed(call, error) from error
            entry.outcome = "timed_out" if isinstance(error, DeadlinePassed) else "broken"
            caller.abort()
            return
        entry.outcome = "answered"
        caller.end()

    def _local(self, caller: Caller, entry: Entry, match: re.Match[str]) -> None:
        entry.status = 200
        view: dict[str, object]
        if match["view"] == "state":
            view = self.state()
        elif match["view"] == "journal":
            view = {"requests": self._journal.rows()}
        else:
            view = {"notifications": [] if self._queue is None else self._queue.notifications()}
        caller.answer(200, [("Content-Type", "application/json")], json.dumps(view).encode())

    def _asynchronous(self, caller: Caller, entry: Entry, match: re.Match[str]) -> None:
        sigv4.check_presence(caller.headers.get("Authorization"))
        endpoint = self._endpoint(match, entry)
        if self._queue is None:
            raise validation_error(f"Endpoint {endpoint.name} is not an asynchronous inference endpoint.")
        deadline = Deadline(self._options.clock, self._options.limits.response_s)
        accepted = accepting.accept(caller, endpoint, self._queue, deadline, self._options.clock())
        entry.status, entry.outcome, entry.request_bytes = 202, "queued", accepted.request_bytes
        caller.answer(202, accepted.headers, accepted.body)

    def _controlled(self, caller: Caller, entry: Entry, _: re.Match[str]) -> None:
        sigv4.check_presence(caller.headers.get("Authorization"))
        if self._control is None:
            raise ServiceError(404, "UnknownOperationException", "there is no store for jobs to work on")
        deadline = Deadline(self._options.clock, self._options.limits.response_s)
        body = caller.read_body(BODY_BYTES, deadline)
        entry.request_bytes = len(body)
        answer = self._control.answer(caller.headers.get(TARGET, ""), body)
        entry.status, entry.outcome = 200, "answered"
        caller.answer(200, [("Content-Type", CONTENT_TYPE)], answer)

    def state(self) -> dict[str, object]:
        """Return what runs here, for `GET /_local/state`."""
        limits = self._options.limits
        return {
            "endpoints": [
                {
                    "name": endpoint.name,
                    "variant": endpoint.variant,
                    "components": sorted(endpoint.components),
                }
                for endpoint in self._registry.all()
            ],
            "limits": {
                "body_bytes": limits.body_bytes,
                "response_s": limits.response_s,
                "stream_s": limits.stream_s,
            },
            "strict": self._options.strict,
            "region": self._options.region,
            "requests": self._journal.count,
        }

    def _admit(self, caller: Caller, entry: Entry, match: re.Match[str], *, stream: bool) -> Call:
        """Return the request with its endpoint found and its headers checked; raises ServiceError."""
        limits = self._options.limits
        deadline = Deadline(self._options.clock, limits.stream_s if stream else limits.response_s)
        endpoint = self._endpoint(match, entry)
        if endpoint.asynchronous is not None:
            raise validation_error(f"Endpoint {endpoint.name} takes asynchronous invocations alone.")
        passed = headers.forwarded(caller.headers, stream=stream)
        named = match.groupdict().get("component")
        if named is not None:
            headers.check(named, headers.REQUEST[headers.COMPONENT])
            passed = [pair for pair in passed if pair[0] != headers.COMPONENT]
            passed.append((headers.COMPONENT, named))
        values = dict(passed)
        if values.get(headers.TARGET_VARIANT, endpoint.variant) != endpoint.variant:
            raise validation_error(f"Endpoint {endpoint.name} has no such variant.")
        if headers.TARGET_MODEL in values:
            raise validation_error(f"Endpoint {endpoint.name} is not a multi-model endpoint.")
        component = values.get(headers.COMPONENT)
        address = _component_address(endpoint, component)
        entry.component = component
        return Call(caller, entry, endpoint, address, passed, deadline)

    def _endpoint(self, match: re.Match[str], entry: Entry) -> Endpoint:
        try:
            endpoint = self._registry.find(check_name(match["endpoint"]))
        except ValueError as error:
            raise validation_error("the endpoint name is malformed") from error
        if endpoint is None:
            raise endpoint_not_found(match["endpoint"])
        entry.endpoint = endpoint.name
        return endpoint

    def _read_body(self, call: Call, *, signed: bool = True) -> bytes:
        caller = call.caller
        body = caller.read_body(self._options.limits.body_bytes, call.deadline)
        call.entry.request_bytes = len(body)
        if signed and self._options.strict:
            path, _, query = caller.path.partition("?")
            request = SignedRequest(caller.command, path, query, header_values(caller.headers.items()), body)
            sigv4.verify(request, self._options.keys, self._options.wall_clock())
        return body

    def _send(self, exchange: Exchange, call: Call, path: str, body: bytes) -> Head:
        """Send the request and return a good head; raises ServiceError (424) for a status that is not 2xx."""
        exchange.send(path, _container_headers(call, body), body)
        head = exchange.head()
        call.entry.container_status = head.status
        if 200 <= head.status < 300:
            return head
        text = self._collect(exchange, call, ERROR_BYTES, cut=True).decode("utf-8", "replace")
        raise model_error(Failure(head.status, text), call.endpoint.name, self._options.region)

    def _collect(self, exchange: Exchange, call: Call, limit_bytes: int, *, cut: bool = False) -> bytes:
        """Return the whole body; above `limit_bytes` its beginning with `cut`, else ServiceError (424)."""
        body = bytearray()
        for piece in exchange.pieces():
            body += piece
            call.entry.response_bytes += len(piece)
            if len(body) > limit_bytes:
                if cut:
                    break
                failure = Failure(0, TOO_LARGE.format(limit=limit_bytes))
                raise model_error(failure, call.endpoint.name, self._options.region)
        return bytes(body)

    def _failed(self, call: Call, error: ExchangeFailed) -> ServiceError:
        text = TIMED_OUT if isinstance(error, DeadlinePassed) else BROKEN
        return model_error(Failure(0, text), call.endpoint.name, self._options.region)


def _container_headers(call: Call, body: bytes) -> headers.Pairs:
    return [
        ("Host", host_header(call.address)),
        *call.passed,
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]


def _component_address(endpoint: Endpoint, component: str | None) -> Address:
    if component is None:
        if endpoint.components:
            raise validation_error(
                "Inference Component Name header is required for endpoints to which you plan to deploy "
                "inference components."
            )
        return endpoint.upstream
    if component not in endpoint.components:
        raise validation_error(f"Inference Component {component} of account {ACCOUNT} not found.")
    return endpoint.components[component]


def _stream_failure(error: ExchangeFailed) -> bytes:
    if isinstance(error, DeadlinePassed):
        return eventstream.model_stream_error("ModelInvocationTimeExceeded", TIMED_OUT)
    return eventstream.model_stream_error("StreamBroken", BROKEN)
