"""Headers the platform forwards: one that names what is not served is refused, the others change nothing."""

from __future__ import annotations

import pytest

from tests.sagemaker_entry.harness import Server

PREFIX = "X-Amzn-SageMaker-"
PROMPT = {"prompt": "ab", "max_tokens": 2}
TGI = {"inputs": "ab", "parameters": {"max_new_tokens": 2}}


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("Target-Model", "model_not_found"),
        ("Adapter-Identifier", "adapter_not_found"),
        ("Adapter-Alias", "adapter_not_found"),
    ],
)
def test_another_model_or_an_adapter_is_never_answered_by_the_served_model(
    server: Server, header: str, code: str
) -> None:
    before = server.engine["adds"]
    status, reply = server.invoke(PROMPT, **{PREFIX + header: "mine.tar.gz"})
    assert status == 404 and reply["error"]["code"] == code
    status, reply = server.invoke(TGI, "/generate", **{PREFIX + header: "mine.tar.gz"})
    assert status == 404 and "mine" not in reply["error"]
    assert server.engine["adds"] == before


@pytest.mark.parametrize(
    "header",
    [
        "Target-Variant",
        "Target-Container-Hostname",
        "Inference-Component",
        "Prefix-Aware-Id",
        "Enable-Explanations",
        "Forwarded-Api",
        "Anything-Else",
    ],
)
def test_what_is_meant_for_the_platform_changes_nothing(server: Server, header: str) -> None:
    plain = server.invoke(PROMPT)[1]["choices"]
    status, reply = server.invoke(PROMPT, **{PREFIX + header: "route=/v1/models"})
    assert status == 200 and reply["choices"] == plain


@pytest.mark.parametrize("path", ["/adapters", "/adapters/a", "/models", "/models/a", "/models/a/invoke"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_routes_of_adapters_and_of_several_models_do_not_exist(
    server: Server, path: str, method: str
) -> None:
    body = {"name": "a", "src": "/opt/ml/model"} if method == "POST" else None
    assert server.request(method, path, body)[0] == 404
