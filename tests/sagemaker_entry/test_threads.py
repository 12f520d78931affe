"""Long work beside the event loop: other greenlets go on, client errors come back quietly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from container.engine.request import SamplingParams
from sagemaker_entry import metrics, replies
from sagemaker_entry.dialects.choose import Dialect, Route
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.replies import LARGE_BODY_BYTES, Replies
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings
from sagemaker_entry.threads import beside
from tests.sagemaker_entry.test_service import FakeEngine, exchange

BLOCK_S = 0.2
SMALL = {"prompt": "hi", "nothing": 1}


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException] | None]:
    """What gevent would report as a failure of the server."""
    kinds: list[type[BaseException] | None] = []
    monkeypatch.setattr(gevent.get_hub(), "print_exception", lambda _, kind, *__: kinds.append(kind))
    return kinds


@pytest.fixture
def ticks() -> Iterator[list[float]]:
    """Times at which the event loop was free."""
    seen: list[float] = []

    def tick() -> None:
        while True:
            seen.append(time.monotonic())
            gevent.sleep(0.01)

    ticking = gevent.spawn(tick)
    gevent.sleep(0)
    yield seen
    ticking.kill()


def block(value: Any) -> Any:
    time.sleep(BLOCK_S)  # not patched here: it stops the thread it runs in
    return value


def test_the_event_loop_goes_on_while_work_is_done_beside_it(ticks: list[float]) -> None:
    assert beside(block, 7) == 7
    assert len(ticks) > 5
    free = len(ticks)
    block(7)
    assert len(ticks) == free, "the test would not notice a stalled loop"


def test_a_clients_error_comes_back_as_itself_and_is_no_failure(
    reported: list[type[BaseException] | None],
) -> None:
    def refuse(param: str) -> None:
        raise ApiError(Code.INVALID_VALUE, param=param, rule="right")

    with pytest.raises(ApiError) as caught:
        beside(refuse, "x")
    assert (caught.value.code, caught.value.param) == (Code.INVALID_VALUE, "x")
    assert reported == []


def test_any_other_failure_is_raised_and_reported(reported: list[type[BaseException] | None]) -> None:
    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        beside(fail)
    assert reported == [RuntimeError]


@pytest.fixture
def understand() -> Callable[[Route, bytes], Any]:
    page = Metrics(metrics.create(), 1)
    service = Service(Settings(model="/m"), FakeEngine([]), page)
    service.defaults = SamplingParams()
    read = Replies(Settings(model="/m"), service, page, "auto", "fp")._understand
    return lambda route, body: read(route, body, exchange())


def padded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode() + b" " * LARGE_BODY_BYTES


@pytest.mark.parametrize("step", ["choose", "parse"])
def test_every_step_of_reading_a_large_body_leaves_the_event_loop_free(
    monkeypatch: pytest.MonkeyPatch,
    understand: Callable[[Route, bytes], Any],
    ticks: list[float],
    step: str,
) -> None:
    original = getattr(replies, step)
    monkeypatch.setattr(replies, step, lambda *arguments: original(*block(arguments)))
    understand(Route.COMPLETIONS, padded(SMALL))
    assert len(ticks) > 5


@pytest.mark.parametrize("encode", [lambda body: json.dumps(body).encode(), padded])
def test_large_and_small_bodies_are_understood_alike(
    understand: Callable[[Route, bytes], Any],
    reported: list[type[BaseException] | None],
    encode: Callable[[dict[str, Any]], bytes],
) -> None:
    dialect, parsed = understand(Route.INVOCATIONS, encode({"prompt": "hi"}))
    assert dialect is Dialect.OPENAI_COMPLETION
    assert parsed.request.max_tokens == 16
    dialect, error = understand(Route.INVOCATIONS, encode(SMALL))
    assert dialect is Dialect.OPENAI_COMPLETION, "the refusal would be worded in another dialect"
    assert error.code is Code.UNKNOWN_FIELD
    dialect, error = understand(Route.INVOCATIONS, encode({"inputs": ""}))
    assert (dialect, error.param) == (Dialect.TGI, "inputs")
    with pytest.raises(ApiError) as caught:
        understand(Route.INVOCATIONS, encode({"nothing": 1}))
    assert caught.value.code is Code.UNKNOWN_SHAPE
    assert reported == []
