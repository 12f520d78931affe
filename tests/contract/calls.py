"""Plain HTTP calls of the contract tests: one request, one reply, nothing hidden.

Owns: sockets it opens. Must not know: the product.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

QUESTION = "What is the capital of France?"
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Reply:
    """A whole HTTP reply with the seconds it took."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


def call(
    port: int, method: str, path: str, body: Any = None, timeout_s: float = DEADLINE_S, **headers: str
) -> Reply:
    """Send one request on a new connection; dict bodies go as JSON."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection.request(method, path, body=body, headers=sent)
        reply = connection.getresponse()
        data = reply.read()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, found, data, time.monotonic() - began)
    finally:
        connection.close()


def chat(text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """Return an OpenAI chat body."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 32, **fields}


def generate(text: str, tokens: int, **parameters: Any) -> dict[str, Any]:
    """Return a TGI body."""
    return {"inputs": text, "parameters": {"max_new_tokens": tokens, **parameters}}


def events(body: bytes) -> list[str]:
    """Return the data of every server-sent event in `body`."""
    return [block[6:] for block in body.decode().split("\n\n") if block.startswith("data: ")]


def raw_request(port: int, path: str, body: bytes, timeout_s: float = DEADLINE_S) -> socket.socket:
    """Send one request and return the open socket, nothing read yet."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def metric(port: int, name: str) -> float:
    """Return the sum of all samples of metric `name`."""
    text = call(port, "GET", "/metrics").body.decode()
    samples = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert samples, f"no metric {name}"
    return sum(float(value) for value in samples)


def wait_for(condition: Any, limit_s: float) -> float:
    """Return the seconds until `condition()` held; fails after `limit_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, f"not within {limit_s} s"
        time.sleep(0.01)
    return time.monotonic() - began
