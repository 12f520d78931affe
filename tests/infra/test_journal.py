"""The journal: what it tells, and that no byte of what was said is in it or in any output."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError

from infra.emulator.journal import ENTRIES, Entry, Journal
from tests.infra.calls import answer_to, raw_request
from tests.infra.conftest import ENDPOINT, Bench
from tests.infra.scripted import cut, reply, stream, wait_until

Start = Callable[..., Bench]
CANARY = "canary-7c1f"


def view(bench: Bench, name: str) -> Any:
    with urllib.request.urlopen(f"{bench.emulator.url}/_local/{name}", timeout=10) as answer:
        return json.load(answer)


def test_the_journal_tells_sizes_names_and_outcomes(bench: Start) -> None:
    here = bench(reply(b"12345"))
    here.client.invoke_endpoint(EndpointName=ENDPOINT, Body=b"123", ContentType="text/plain")["Body"].read()
    wait_until(lambda: bool(here.emulator.journal()))
    here.container.script = stream([b"ab", b"c"])
    list(here.client.invoke_endpoint_with_response_stream(EndpointName=ENDPOINT, Body=b"1234")["Body"])
    wait_until(lambda: len(here.emulator.journal()) == 2)
    first, second = view(here, "journal")["requests"]
    assert first["number"] == 1
    assert (first["route"], first["endpoint"], first["status"]) == ("invoke", ENDPOINT, 200)
    assert (first["request_bytes"], first["response_bytes"], first["outcome"]) == (3, 5, "answered")
    assert "Content-Type" in first["request_headers"]
    assert (second["route"], second["parts"], second["response_bytes"]) == ("stream", 2, 3)
    assert second["duration_s"] >= 0


def test_the_state_names_endpoints_and_limits(bench: Start) -> None:
    here = bench(reply(), components={"left": "127.0.0.1:1"}, strict=True)
    state = view(here, "state")
    assert state == here.emulator.state()
    assert state["endpoints"] == [{"name": ENDPOINT, "variant": "AllTraffic", "components": ["left"]}]
    assert state["limits"] == {"body_bytes": 6_291_456, "response_s": 60.0, "stream_s": 480.0}
    assert state["strict"] is True
    assert state["requests"] == 0


def test_no_byte_of_a_body_or_a_header_value_is_kept_or_printed(
    bench: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    said = CANARY.encode()
    here = bench(reply(said))
    everywhere: dict[str, Any] = {
        "Body": said,
        "ContentType": f"text/{CANARY}",
        "Accept": CANARY,
        "CustomAttributes": CANARY,
        "InferenceId": CANARY,
        "SessionId": CANARY,
        "TargetContainerHostname": CANARY,
        "PrefixAwareId": CANARY,
    }
    invoke, stream_call = here.client.invoke_endpoint, here.client.invoke_endpoint_with_response_stream
    invoke(EndpointName=ENDPOINT, **everywhere)["Body"].read()
    for broken in (reply(said, 400), reply(said, 503, f"X-{CANARY}: {CANARY}"), stream([said], ending=cut)):
        here.container.script = broken
        with pytest.raises(ClientError):
            invoke(EndpointName=ENDPOINT, **everywhere)
    answer = stream_call(EndpointName=ENDPOINT, Body=said)["Body"]
    with closing(answer), pytest.raises(EventStreamError):
        list(answer)
    for wrong in ({"EndpointName": CANARY}, {"EndpointName": ENDPOINT, "TargetVariant": CANARY}):
        with pytest.raises(ClientError):
            invoke(Body=said, **wrong)
    for target in (f"/{CANARY}", f"/endpoints/{CANARY}!/invocations", f"/_local/{CANARY}?{CANARY}"):
        answer_to(here, raw_request(said, path=target))
    answer_to(here, f"{CANARY} / HTTP/1.1\r\n\r\n".encode())
    answer_to(here, f"GET {CANARY}\r\nX {CANARY}\r\n\r\n".encode())
    odd = raw_request(said, "Content-Length: 11", f"X-({CANARY}): {CANARY}")
    answer_to(here, odd)
    wait_until(lambda: len(here.emulator.journal()) >= 10)
    assert CANARY not in json.dumps(view(here, "journal"))
    assert CANARY not in json.dumps(view(here, "state"))
    captured = capfd.readouterr()
    assert CANARY not in captured.out + captured.err


def test_the_journal_keeps_the_last_entries_and_counts_all() -> None:
    journal = Journal()
    for number in range(ENTRIES + 5):
        journal.add(Entry(request_bytes=number))
    rows = journal.rows()
    assert len(rows) == ENTRIES
    assert (rows[0]["number"], rows[-1]["number"]) == (6, ENTRIES + 5)
    assert journal.count == ENTRIES + 5
