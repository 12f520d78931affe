"""Signatures, against botocore's signer as the second implementation."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from infra.emulator import LOCAL_KEYS, sigv4
from infra.emulator.caller import header_values
from infra.emulator.errors import ServiceError
from infra.emulator.sigv4 import Keys, SignedRequest


def signed(
    url: str = "http://127.0.0.1:8181/endpoints/demo/invocations",
    body: bytes = b"{}",
    service: str = "sagemaker",
    **headers: str,
) -> SignedRequest:
    request: Any = AWSRequest(method="POST", url=url, data=body, headers=headers)
    credentials = Credentials(LOCAL_KEYS.access_key_id, LOCAL_KEYS.secret_access_key)
    SigV4Auth(credentials, service, "eu-west-1").add_auth(request)
    parts = urlsplit(url)
    found = header_values([*request.headers.items(), ("Host", parts.netloc)])
    return SignedRequest("POST", parts.path, parts.query, found, body)


def changed(request: SignedRequest, **fields: Any) -> SignedRequest:
    names = ("method", "path", "query", "headers", "body")
    return SignedRequest(**{**{name: getattr(request, name) for name in names}, **fields})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8181/",
        "http://127.0.0.1:8181/endpoints/demo/invocations",
        "http://127.0.0.1:8181/endpoints/a%20b/invocations",
        "http://127.0.0.1:8181/e?b=2&a=1&c=&a=0",
        "http://127.0.0.1:8181/e?q=a%2Fb%20c~d",
    ],
)
def test_what_botocore_signs_is_accepted(url: str) -> None:
    request = signed(url, b"\x00\xff body", **{"X-Amzn-SageMaker-Custom-Attributes": " a   b "})
    sigv4.verify(request, LOCAL_KEYS, time.time())


@pytest.mark.parametrize(
    "fields",
    [
        {"body": b"{ }"},
        {"path": "/endpoints/other/invocations"},
        {"query": "a=1"},
        {"method": "PUT"},
    ],
)
def test_anything_changed_after_signing_is_refused(fields: dict[str, Any]) -> None:
    refuse(changed(signed(), **fields), "InvalidSignatureException")


def test_a_changed_signed_header_is_refused() -> None:
    request = signed(**{"X-Amzn-SageMaker-Target-Model": "a"})
    name = "x-amzn-sagemaker-target-model"
    refuse(changed(request, headers={**request.headers, name: "b"}), "InvalidSignatureException")


def test_a_signature_is_current_for_five_minutes_either_way() -> None:
    request = signed()
    now_s = time.time()
    for offset_s in (-298, 298):
        sigv4.verify(request, LOCAL_KEYS, now_s + offset_s)
    for offset_s in (-305, 305):
        refuse(request, "InvalidSignatureException", now_s + offset_s)
    undated = {name: value for name, value in request.headers.items() if name != "x-amz-date"}
    refuse(changed(request, headers=undated), "InvalidSignatureException")
    garbled = {**request.headers, "x-amz-date": "yesterday"}
    refuse(changed(request, headers=garbled), "InvalidSignatureException")


def test_another_service_or_key_is_refused() -> None:
    refuse(signed(service="s3"), "InvalidSignatureException")
    with pytest.raises(ServiceError) as caught:
        sigv4.verify(signed(), Keys("other", LOCAL_KEYS.secret_access_key), time.time())
    assert caught.value.kind == "UnrecognizedClientException"
    with pytest.raises(ServiceError, match="InvalidSignature"):
        sigv4.verify(signed(), Keys(LOCAL_KEYS.access_key_id, "other"), time.time())


def test_host_and_date_must_be_among_the_signed_headers() -> None:
    request = signed()
    for name in ("host;", ";x-amz-date"):
        authorization = request.headers["authorization"]
        assert name in authorization
        less = {**request.headers, "authorization": authorization.replace(name, "", 1)}
        with pytest.raises(ServiceError) as caught:
            sigv4.verify(changed(request, headers=less), LOCAL_KEYS, time.time())
        assert "leaves out" in caught.value.message


@pytest.mark.parametrize("text", [None, "", "Basic abc", "AWS4-HMAC-SHA256 Credential=a", "Bearer x"])
def test_what_is_no_signature_is_refused(text: str | None) -> None:
    with pytest.raises(ServiceError) as caught:
        sigv4.check_presence(text)
    assert caught.value.status == 403


def refuse(request: SignedRequest, kind: str, now_s: float | None = None) -> None:
    with pytest.raises(ServiceError) as caught:
        sigv4.verify(request, LOCAL_KEYS, time.time() if now_s is None else now_s)
    assert (caught.value.status, caught.value.kind) == (403, kind)
