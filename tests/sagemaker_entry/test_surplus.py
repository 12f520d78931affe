"""The short way out: only what is surplus takes it, and its replies are the application's own."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sagemaker_entry.body import LARGE_BODY_BYTES
from sagemaker_entry.caller import ApiKey
from sagemaker_entry.dialects.choose import GENERATING, Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ENVIRON_KEY
from sagemaker_entry.surplus import Surplus
from tests.sagemaker_entry.harness import Server, post, wait_until

KEY = "key-of-a-test"
# Valid, so that the request is served all the same; never echoed, and it always goes through the application.
THE_LONG_WAY = "X-Amzn-SageMaker-Custom-Attributes: a b"


class Refusals:
    """Counts what it is asked to word."""

    def __init__(self) -> None:
        self.routes: list[Route] = []

    def refuse(self, route: Route, exchange: Any, full_s: int) -> tuple[int, list[tuple[str, str]], bytes]:
        self.routes.append(route)
        return 429, [("Retry-After", str(full_s))], b"full"


def environ(**changes: Any) -> dict[str, Any]:
    """Return the environment of an ordinary request; None takes a value away."""
    values: dict[str, Any] = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/invocations",
        "CONTENT_LENGTH": "20",
        "CONTENT_TYPE": "application/json",
        "HTTP_AUTHORIZATION": f"Bearer {KEY}",
        ENVIRON_KEY: SimpleNamespace(route="other", draining=lambda: False),
    } | changes
    return {name: value for name, value in values.items() if value is not None}


def through(
    request: dict[str, Any], *, full_s: int = 7, unhealthy: ApiError | None = None
) -> tuple[bool, Refusals, list[Any]]:
    """Return whether the application was asked, the refusals, and what started the response."""
    asked: list[Any] = []
    started: list[Any] = []
    refusals = Refusals()

    def application(request: dict[str, Any], _: Any) -> list[bytes]:
        asked.append(request)
        return [b"served"]

    surplus = Surplus(
        application,
        SimpleNamespace(error=lambda: unhealthy, full_s=lambda: full_s),
        ApiKey(KEY),
        refusals,
    )
    body = b"".join(surplus(request, lambda *start: started.append(start)))
    assert body == (b"served" if asked else b"full")
    return bool(asked), refusals, started


@pytest.mark.parametrize("path", GENERATING)
def test_surplus_is_refused_without_the_application(path: str) -> None:
    request = environ(PATH_INFO=path)
    asked, refusals, started = through(request)
    assert not asked
    assert refusals.routes == [GENERATING[path]]
    headers = [("Retry-After", "7"), ("X-Content-Type-Options", "nosniff")]
    assert started == [("429 TOO MANY REQUESTS", headers)]
    assert request[ENVIRON_KEY].route == GENERATING[path].value


@pytest.mark.parametrize(
    "changes",
    [
        {"REQUEST_METHOD": "GET", "PATH_INFO": "/"},
        {"PATH_INFO": "/tokenize"},
        {"PATH_INFO": "/ping"},
        {"PATH_INFO": "//invocations"},
        {"CONTENT_LENGTH": None},
        {"CONTENT_LENGTH": "-1"},
        {"CONTENT_LENGTH": str(LARGE_BODY_BYTES + 1)},
        {"CONTENT_TYPE": "text/plain"},
        {"HTTP_CONTENT_ENCODING": "gzip"},
        {"HTTP_AUTHORIZATION": None},
        {"HTTP_AUTHORIZATION": "Bearer wrong"},
        {"HTTP_X_AMZN_SAGEMAKER_CUSTOM_ATTRIBUTES": "c000b4f9"},
        {ENVIRON_KEY: SimpleNamespace(draining=lambda: True)},
    ],
)
def test_whatever_else_there_is_to_say_the_application_says_it(changes: dict[str, Any]) -> None:
    asked, refusals, _ = through(environ(**changes))
    assert asked
    assert not refusals.routes


def test_with_room_or_without_an_engine_the_application_decides() -> None:
    assert through(environ(), full_s=0)[0]
    assert through(environ(), unhealthy=ApiError(Code.ENGINE_DOWN, retry_after_s=1))[0]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server whose engine says for as long as the tests need that it is full."""
    directory: Path = tmp_path_factory.mktemp("full")
    (directory / "key").write_text(KEY + "\n")
    crowd = {"prompt": "ab crowd=9 wait=50 ", "max_tokens": 600}
    with Server(
        directory, STRONGROOM_API_KEY_FILE=str(directory / "key"), STRONGROOM_BODY_LIMIT_BYTES="4096"
    ) as running:
        thread = threading.Thread(
            target=running.invoke, args=(crowd,), kwargs={"Authorization": f"Bearer {KEY}"}
        )
        thread.start()
        wait_until(lambda: ask(running, "/invocations", b'{"inputs": "ab"}')[0] == 429, 10, "a full engine")
        yield running
        still_full = ask(running, "/invocations", b'{"inputs": "ab"}')[0] == 429
    thread.join()
    assert still_full, "the engine had room again before the tests were over"


def ask(server: Server, path: str, body: bytes, *headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the reply, without what differs from one reply to the next."""
    sent = post(path, body, f"Authorization: Bearer {KEY}", *headers)
    head, _, reply = server.raw(sent).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    found = dict(sorted(line.split(": ", 1) for line in lines))
    del found["Date"]
    return int(status.split()[1]), found, re.sub(rb"[0-9a-f]{24}", b"ID", reply)


BODIES = {
    "tgi": {"inputs": "ab"},
    "chat": {"messages": [{"role": "user", "content": "ab"}]},
    "chat stream": {"messages": [{"role": "user", "content": "ab"}], "stream": True},
    "completion": {"prompt": "ab"},
    "unknown field": {"prompt": "ab", "max_token": 3},
    "wrong type": {"inputs": "ab", "parameters": 3},
    "unknown shape": {"text": "ab"},
    "cohere": {"message": "ab"},
    "session": {"requestType": "NEW_SESSION"},
    "model": {"prompt": "ab", "model": "another"},
}


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("body", BODIES)
def test_the_short_way_says_what_the_long_way_says(full: Server, path: str, body: str) -> None:
    sent = json.dumps(BODIES[body]).encode()
    short, long = (ask(full, path, sent, *headers) for headers in ((), (THE_LONG_WAY,)))
    assert short == long
    assert short[0] in (400, 404, 422, 429)


@pytest.mark.parametrize("body", [b"", b"{", b'{"inputs": "\xff"}', b"[]", b"x" * 5000, b'{"a": 1, "a": 2}'])
def test_a_body_that_is_no_request_is_told_so_on_either_way(full: Server, body: bytes) -> None:
    short, long = (ask(full, "/invocations", body, *headers) for headers in ((), (THE_LONG_WAY,)))
    assert short == long
    assert short[0] in (400, 413)


def test_refusals_are_counted_on_either_way(full: Server) -> None:
    def rejected() -> float:
        text = full.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})[2].decode()
        return float(re.findall(r"^strongroom_requests_rejected_total (\S+)$", text, re.MULTILINE)[0])

    for headers in ((), (THE_LONG_WAY,)):
        before = rejected()
        ask(full, "/generate", b'{"inputs": "ab"}', *headers)
        assert rejected() == before + 1
