"""Bodies as the unmodified Hugging Face clients make them, caught before they are sent."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import InferenceClient

from sagemaker_entry.dialects.choose import Route
from sagemaker_entry.generation import ChatPrompt, TextPrompt
from tests.sagemaker_entry.dialect_samples import requested


class _CaughtError(Exception):
    """Carries what the client was about to post."""


class CatchingClient(InferenceClient):
    """The real client with its last step, the post, replaced."""

    def _inner_post(self, request_parameters: Any, *args: Any, **kwargs: Any) -> Any:
        raise _CaughtError(request_parameters.url, request_parameters.json)


def caught(call: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(_CaughtError) as info:
        call(CatchingClient(model="http://localhost:1"))
    url, body = info.value.args
    return url.removeprefix("http://localhost:1"), body


def test_a_text_generation_call_of_the_hub_client_parses() -> None:
    path, body = caught(
        lambda client: client.text_generation(
            "hi",
            details=True,
            stream=True,
            max_new_tokens=5,
            stop=["x"],
            seed=1,
            do_sample=True,
            top_n_tokens=2,
        )
    )
    assert path in ("", "/")
    request = requested(Route.ROOT, body)
    assert request.prompts == (TextPrompt("hi"),)
    assert (request.max_tokens, request.seed, request.stop, request.stream) == (5, 1, ("x",), True)
    assert request.sampling.top_logprobs == 2


def test_a_plain_text_generation_call_of_the_hub_client_parses() -> None:
    _, body = caught(lambda client: client.text_generation("hi"))
    assert requested(Route.ROOT, body).prompts == (TextPrompt("hi"),)


def test_a_chat_call_of_the_hub_client_parses_although_it_names_a_dummy_model() -> None:
    messages = [{"role": "user", "content": "hi"}]
    path, body = caught(
        lambda client: client.chat_completion(messages, max_tokens=5, stream=True, logprobs=True, stop=["a"])
    )
    assert path == Route.CHAT
    assert body["model"] == "dummy"
    request = requested(Route.CHAT, body)
    assert request.model == "smol"
    assert request.sampling.top_logprobs == 0
    assert isinstance(request.prompts[0], ChatPrompt)
