"""The caller: sends a plan over several connections at once and keeps what it needs of the answers.

Owns: connections, what counts as an answer, what is kept of one. Must not know: what an answer proves.
Invariant: a call is made once, and again only when it was refused for being one too many (429); each call has
one outcome.
"""

from __future__ import annotations

import http.client
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from infra.emulator.registry import parse_address
from infra.emulator.upstream import Address, connect
from infra.privacy.plan import Call

AT_ONCE: Final = 8
WAIT_S: Final = 120.0
TRIES: Final = 60
BUSY: Final = 429
BUSY_S: Final = 0.5
LEFT: Final = -1  # the caller went, as the plan says
BROKEN: Final = 0  # no whole answer came


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call's end; `reply` is head and body."""

    call: Call
    status: int
    reply: bytes

    @property
    def as_expected(self) -> bool:
        return self.status == LEFT if self.call.leave else self.status in self.call.expected


def make_all(upstream: str, calls: Sequence[Call]) -> list[Outcome]:
    """Make every call and return the outcomes in the calls' order."""
    address = parse_address(upstream)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda call: _one(address, call), calls))


def read_page(upstream: str, path: str) -> tuple[int, Mapping[str, str], bytes]:
    """Return status, headers and body of one GET; raises OSError, http.client.HTTPException."""
    connection = http.client.HTTPConnection("localhost", timeout=WAIT_S)
    try:
        connection.sock = connect(parse_address(upstream), WAIT_S)
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()
    finally:
        connection.close()


def tally(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Return kind -> status -> how often; a caller that left counts as `left`."""
    names = {LEFT: "left", BROKEN: "broken"}
    found: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        name = names.get(outcome.status, str(outcome.status))
        found.setdefault(outcome.call.kind, Counter())[name] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items()}


def _one(address: Address, call: Call) -> Outcome:
    for _ in range(TRIES):
        outcome = _try(address, call)
        if outcome.status != BUSY:
            break
        time.sleep(BUSY_S)
    return outcome


def _try(address: Address, call: Call) -> Outcome:
    connection = http.client.HTTPConnection("localhost", timeout=WAIT_S)
    try:
        connection.sock = connect(address, WAIT_S)
        connection.request(call.method, call.path, call.body or None, dict(call.headers))
        if call.leave and b'"stream": true' not in call.body:
            return Outcome(call, LEFT, b"")
        reply = connection.getresponse()
        if call.leave and reply.status == http.client.OK:
            return Outcome(call, LEFT, reply.read1())
        head = "".join(f"{name}: {value}\n" for name, value in reply.getheaders())
        return Outcome(call, reply.status, head.encode() + reply.read())
    except (OSError, http.client.HTTPException):
        return Outcome(call, BROKEN, b"")
    finally:
        connection.close()
