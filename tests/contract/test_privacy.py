"""Nothing that a client sends or receives reaches a log, a metric or another client's error."""

from __future__ import annotations

import secrets

import pytest

from tests.contract.calls import call, chat, generate
from tests.contract.conftest import Running

pytestmark = pytest.mark.real_model


def test_canaries_reach_no_log_metric_or_error(endpoint: Running) -> None:
    canary = "canary" + secrets.token_hex(8)
    port = endpoint.port
    bodies = [
        chat(f"Say {canary}", max_tokens=4),
        generate(canary, 2),
        chat(canary, max_tokens=2, stop=[canary], stream=True),
        chat(canary, temperature=canary),
        chat(canary, **{canary * 4: 1}),
        {"inputs": canary, "parameters": {"temperature": -1, canary: canary}},
        {"model": canary, "messages": [{"role": canary, "content": canary}]},
        {"prompt": [canary, 1]},
        [canary],
        canary,
    ]
    replies = [call(port, "POST", "/invocations", body) for body in bodies]
    replies += [
        call(port, "POST", f"/{canary}", {}),
        call(
            port, "POST", "/invocations", f'{{"inputs": "{canary}'.encode(), Content_Type="application/json"
        ),
        call(port, "POST", "/invocations", chat(), **{f"X-{canary}": canary}),
        call(port, "POST", "/invocations", canary.encode(), Content_Type=f"text/{canary}"),
        call(port, "GET", f"/ping?{canary}"),
    ]
    for reply in replies:
        assert reply.status != 500
        if reply.status >= 400 and reply.status != 200:
            assert canary.encode() not in reply.body.replace((canary * 4).encode(), b"")
    assert canary not in endpoint.log.read_text()
    assert canary not in call(port, "GET", "/metrics").body.decode()


def test_the_log_says_what_happened_in_lengths_and_codes(endpoint: Running) -> None:
    call(endpoint.port, "POST", "/invocations", chat(max_tokens=3))
    text = endpoint.log.read_text()
    assert '"route":"/invocations"' in text
    assert '"completion_tokens":3' in text
