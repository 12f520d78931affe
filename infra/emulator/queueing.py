"""Asynchronous calls: accepted at once, run in turn, answered in a store.

Owns: the queue, its bounds, output and failure objects, notifications. Must not know: callers' sockets.
Invariant: an accepted call leaves exactly one object, its output or its failure, and one notification; after
`close` none is running.

The platform tells a topic of SNS; here the same document is kept for who asks, and given to `notify`.
"""

from __future__ import annotations

import collections
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from infra.emulator.calling import Answer, Stop, call
from infra.emulator.errors import BROKEN, TIMED_OUT
from infra.emulator.stores import ObjectMissing, Store, join
from infra.emulator.upstream import Address, ClientGone, Clock, DeadlinePassed, UpstreamBroken

INLINE_BYTES: Final = 128_000  # largest inline body (`Body` of InvokeEndpointAsync)
TTL_S: Final = 21_600
TIMEOUT_S: Final = 900
NOTIFICATIONS: Final = 1000
REGION_EVENT: Final = {"eventVersion": "1.0", "eventSource": "aws:sagemaker", "eventName": "InferenceResult"}

Notify = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class AsyncConfig:
    """Where an endpoint's asynchronous calls leave their results, and how many run at once."""

    output: str
    failure: str | None = None
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class Pending:
    """One accepted call."""

    endpoint: str
    address: Address
    headers: list[tuple[str, str]] = field(repr=False)
    body: bytes | None = field(repr=False)  # None: at `input_location`
    input_location: str | None
    output_location: str
    failure_location: str
    inference_id: str
    ttl_s: float
    timeout_s: float
    received_s: float


class AsyncQueue:
    """Runs asynchronous calls of all endpoints."""

    def __init__(
        self, store: Store, region: str, concurrency: int, clock: Clock, notify: Notify | None = None
    ) -> None:
        self._store = store
        self._region = region
        self._clock = clock
        self._notify = notify
        self._stop = Stop()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="async")
        self._lock = threading.Lock()
        self._told: collections.deque[dict[str, Any]] = collections.deque(maxlen=NOTIFICATIONS)

    def close(self) -> None:
        """End what runs, forget what waits."""
        self._stop.end()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stop.close()

    def add(self, pending: Pending) -> None:
        """Take a call."""
        self._pool.submit(self._run, pending)

    def notifications(self) -> list[dict[str, Any]]:
        """Return what would have gone to the topics, oldest first."""
        with self._lock:
            return list(self._told)

    def _run(self, pending: Pending) -> None:
        try:
            if self._clock() - pending.received_s > pending.ttl_s:
                self._failed(pending, "The request expired before it was run.")
                return
            body = pending.body
            if body is None:
                body = self._store.read(pending.input_location or "")
            answer = call(pending.address, pending.headers, body, self._stop, pending.timeout_s, self._clock)
            if answer.good:
                self._done(pending, answer)
            else:
                reason = f"Received error ({answer.status}) from primary"
                self._failed(pending, reason, answer)
        except ObjectMissing as error:
            self._failed(pending, f"The input cannot be read: {error}.")
        except DeadlinePassed:
            self._failed(pending, TIMED_OUT)
        except UpstreamBroken:
            self._failed(pending, BROKEN)
        except ClientGone:
            return  # the emulator closes

    def _done(self, pending: Pending, answer: Answer) -> None:
        self._store.write(pending.output_location, answer.body, answer.content_type)
        reply = {"contentType": answer.content_type, "outputLocation": pending.output_location}
        if answer.attributes is not None:
            reply["customAttributes"] = answer.attributes
        self._tell(pending, "Completed", responseParameters=reply)

    def _failed(self, pending: Pending, reason: str, answer: Answer | None = None) -> None:
        body = reason.encode() if answer is None else answer.body
        kind = "text/plain" if answer is None else answer.content_type
        try:
            self._store.write(pending.failure_location, body, kind)
        except ObjectMissing:
            reason += " The failure cannot be written either."
        location = {"failureLocation": pending.failure_location}
        self._tell(pending, "Failed", failureReason=reason, responseParameters=location)

    def _tell(self, pending: Pending, status: str, **more: Any) -> None:
        given = dict(pending.headers)
        asked = {"endpointName": pending.endpoint, "inputLocation": pending.input_location}
        for name, header in (("contentType", "Content-Type"), ("accept", "Accept")):
            if header in given:
                asked[name] = given[header]
        document: dict[str, Any] = {
            "awsRegion": self._region,
            "eventTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "invocationStatus": status,
            "inferenceId": pending.inference_id,
            "requestParameters": asked,
            **REGION_EVENT,
            **more,
        }
        with self._lock:
            self._told.append(document)
        if self._notify is not None:
            self._notify(document)


def locations(config: AsyncConfig, extension: str | None, filename: str | None) -> tuple[str, str]:
    """Return where output and failure of one call go."""
    name = filename or f"{uuid.uuid4()}.out"
    stem, dot, suffix = name.partition(".")
    output = join(config.output, extension or "", name)
    return output, join(config.failure or config.output, extension or "", f"{stem}-error{dot}{suffix}")
