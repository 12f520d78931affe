"""A worker that still loads its text model: a body with tools waits for it, as any other does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gevent
import msgspec
import pytest

from container.engine.request import SamplingParams
from container.ranks.messages import Welcome
from container.text.model import TextModel
from sagemaker_entry import model_files, replies, service
from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.replies import LARGE_BODY_BYTES, Replies
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings
from tests.sagemaker_entry.harness import write_model
from tests.sagemaker_entry.test_service import FakeEngine, delta, exchange, page
from tests.text.tool_templates import HERMES

__all__ = ["page"]  # a fixture

LOAD_S = 0.1
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
WITH_TOOLS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"type": "function", "function": FUNCTION}],
    "max_tokens": 4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextModel]:
    model = TextModel.load(model_files.read(str(write_model(tmp_path_factory.mktemp("m"), HERMES))))
    yield model
    model.close()


class Roomy(FakeEngine):
    """The fake engine with room for a description of tools."""

    def welcome(self, wait_s: float = 1.0) -> Welcome:
        return msgspec.structs.replace(super().welcome(wait_s), sequence_tokens=1024)


class Reading:
    """Counts how often a body is read, and does read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._read = replies._read
        monkeypatch.setattr(replies, "_read", self)

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self._read(*arguments)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    return Reading(monkeypatch)


def new_worker(page: Metrics) -> tuple[Service, Replies]:
    engine = Roomy([[delta("yes", finish="stop_token")]])
    settings = Settings(model="/m")
    made = Service(settings, engine, page)  # type: ignore[arg-type]
    return made, Replies(settings, made, page, "auto", "fp")


@pytest.mark.parametrize("padding", [0, LARGE_BODY_BYTES], ids=["here", "in a thread"])
def test_a_body_with_tools_is_read_again_once_the_text_model_is_there(
    page: Metrics, text: TextModel, reading: Reading, padding: int
) -> None:
    loading, answers = new_worker(page)
    gevent.spawn_later(LOAD_S, loading.ready, text, SamplingParams())
    body = json.dumps(WITH_TOOLS).encode() + b" " * padding
    reply = answers.generate(Route.CHAT, body, exchange())
    assert reply.status_code == 200, reply.get_data()
    assert reading.count == 2, "it was to be read once in vain"
    assert json.loads(reply.get_data())["choices"][0]["message"]["content"] == "yes"


def test_a_body_with_tools_is_refused_for_now_when_the_text_model_does_not_come(
    page: Metrics, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TEXT_WAIT_S", LOAD_S)
    _, answers = new_worker(page)
    reply = answers.generate(Route.CHAT, json.dumps(WITH_TOOLS).encode(), exchange())
    assert reply.status_code == 503
    assert int(reply.headers["Retry-After"]) > 0
    assert json.loads(reply.get_data())["error"]["code"] == "loading"
    assert reading.count == 2


def test_a_body_without_tools_is_read_once(page: Metrics, text: TextModel, reading: Reading) -> None:
    loading, answers = new_worker(page)
    gevent.spawn_later(LOAD_S, loading.ready, text, SamplingParams())
    plain = {name: value for name, value in WITH_TOOLS.items() if name != "tools"}
    reply = answers.generate(Route.CHAT, json.dumps(plain).encode(), exchange())
    assert (reply.status_code, reading.count) == (200, 1)
