"""InvokeEndpointAsync: a request becomes a pending call, and the caller learns where its answer will be.

Owns: the operation's own rules. Must not know: sockets, how a pending call is run.
Invariant: what is accepted has one input, an output location and a failure location.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Final

from infra.emulator import headers
from infra.emulator.caller import Caller
from infra.emulator.errors import validation_error
from infra.emulator.queueing import INLINE_BYTES, TIMEOUT_S, TTL_S, AsyncQueue, Pending, locations
from infra.emulator.registry import Endpoint
from infra.emulator.upstream import Deadline

TTL_RANGE_S: Final = (60, 21_600)
TIMEOUT_RANGE_S: Final = (1, 3600)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the caller is told."""

    headers: headers.Pairs
    body: bytes
    request_bytes: int


def accept(
    caller: Caller, endpoint: Endpoint, queue: AsyncQueue, deadline: Deadline, now_s: float
) -> Accepted:
    """Queue the caller's call; raises ServiceError."""
    if endpoint.asynchronous is None:
        raise validation_error(f"Endpoint {endpoint.name} is not an asynchronous inference endpoint.")
    passed, own = headers.asynchronous(caller.headers)
    ttl_s = _seconds(own.get(headers.TTL), TTL_S, TTL_RANGE_S, "requestTTLSeconds")
    timeout_s = _seconds(own.get(headers.TIMEOUT), TIMEOUT_S, TIMEOUT_RANGE_S, "invocationTimeoutSeconds")
    body = caller.read_body(INLINE_BYTES, deadline)
    location = own.get(headers.INPUT_LOCATION)
    if bool(body) == (location is not None):
        raise validation_error("exactly one of InputLocation and Body must be given")
    given = dict(passed).get(headers.INFERENCE_ID)
    inference_id = given or str(uuid.uuid4())
    output, failure = locations(endpoint.asynchronous, own.get(headers.EXTENSION), own.get(headers.FILENAME))
    queue.add(
        Pending(
            endpoint=endpoint.name,
            address=endpoint.upstream,
            headers=passed,
            body=body or None,
            input_location=location,
            output_location=output,
            failure_location=failure,
            inference_id=inference_id,
            ttl_s=ttl_s,
            timeout_s=timeout_s,
            received_s=now_s,
        )
    )
    told = [
        ("Content-Type", "application/json"),
        (f"{headers.PREFIX}OutputLocation", output),
        (f"{headers.PREFIX}FailureLocation", failure),
    ]
    return Accepted(told, json.dumps({"InferenceId": inference_id}).encode(), len(body))


def _seconds(text: str | None, default: int, bounds: tuple[int, int], member: str) -> float:
    if text is None:
        return default
    low, high = bounds
    if not low <= int(text) <= high:
        where = f"Value at '{member}' failed to satisfy constraint"
        rule = f"Member must have value between {low} and {high}"
        raise validation_error(f"1 validation error detected: {where}: {rule}")
    return int(text)
