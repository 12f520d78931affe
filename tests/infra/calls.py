"""Calls of an emulator: boto3's, and raw bytes where a client would not send such."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.infra.conftest import ENDPOINT, Bench

SCOPE = "20260101/us-east-1/sagemaker/aws4_request"
AUTHORIZATION = f"AWS4-HMAC-SHA256 Credential=k/{SCOPE}, SignedHeaders=host, Signature={'0' * 64}"


def invoke(bench: Bench, body: bytes = b"{}", **extra: Any) -> Any:
    return bench.client.invoke_endpoint(EndpointName=ENDPOINT, Body=body, **extra)


def refused(bench: Bench, body: bytes = b"{}", **extra: Any) -> dict[str, Any]:
    with pytest.raises(ClientError) as caught:
        invoke(bench, body, **extra)
    response: dict[str, Any] = caught.value.response
    return response


def raw_request(body: bytes = b"{}", *extra: str, path: str = f"/endpoints/{ENDPOINT}/invocations") -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Authorization: {AUTHORIZATION}",
        *(extra or (f"Content-Length: {len(body)}",)),
        "",
        "",
    )
    return "\r\n".join(lines).encode("latin-1") + body


def answer_to(bench: Bench, request: bytes) -> tuple[int, dict[str, Any]]:
    """Send raw bytes, return status and JSON document."""
    with socket.create_connection(("127.0.0.1", bench.emulator.port), timeout=10) as raw:
        raw.sendall(request)
        data = b""
        while b"}" not in data and (more := raw.recv(65536)):
            data += more
    top, _, body = data.partition(b"\r\n\r\n")
    return int(top.split(b" ")[1]), json.loads(body)
