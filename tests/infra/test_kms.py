"""AWS KMS as key service: the calls' exact form, and every way they fail, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.stub import Stubber

from infra.kms import KmsDecrypter, wrap
from model_package.recipients import KeyContext, Owner, check
from model_package.refusal import KeyRefused, Refusal

ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
CONTEXT = KeyContext(bytes(range(16)), bytes(range(32)), Owner.VENDOR)
KEY = bytes(range(200, 232))
SENT = {
    "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    "EncryptionContext": {
        "strongroom:package_id": bytes(range(16)).hex(),
        "strongroom:content_sha256": bytes(range(32)).hex(),
        "strongroom:owner": "vendor",
    },
    "KeyId": ARN,
}


@contextmanager
def kms(**options: Any) -> Iterator[Any]:
    client = boto3.client(
        "kms",
        region_name="eu-west-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2),
        **options,
    )
    try:
        yield client
    finally:
        client.close()


def refusal_of(client: Any) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        KmsDecrypter(client).decrypt(ARN, b"ciphertext", CONTEXT.encryption_context())
    assert raised.value.__context__ is None
    return raised.value.refusal


def fresh(content: bytes) -> bytes:
    return bytes(bytearray(content))  # as from the network: an object of its own, which is wiped


def test_decrypting_names_key_algorithm_and_context() -> None:
    with kms() as client, Stubber(client) as stub:
        answer = {"Plaintext": fresh(KEY), "KeyId": ARN, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}
        stub.add_response("decrypt", answer, {**SENT, "CiphertextBlob": b"ciphertext"})
        key = KmsDecrypter(client).decrypt(ARN, b"ciphertext", CONTEXT.encryption_context())
        stub.assert_no_pending_responses()
    assert isinstance(key, bytearray) and key == KEY


def test_the_copy_that_was_handed_over_is_wiped() -> None:
    plaintext = fresh(KEY)
    with kms() as client, Stubber(client) as stub:
        stub.add_response("decrypt", {"Plaintext": plaintext, "KeyId": ARN})
        KmsDecrypter(client).decrypt(ARN, b"ciphertext", {})
    assert plaintext == bytes(32)


@pytest.mark.parametrize(
    "code",
    [
        "AccessDeniedException",
        "InvalidCiphertextException",
        "IncorrectKeyException",
        "DisabledException",
        "KMSInvalidStateException",
        "NotFoundException",
    ],
)
def test_what_the_service_refuses_is_refused(code: str) -> None:
    with kms() as client, Stubber(client) as stub:
        stub.add_client_error("decrypt", code, "a message that is not repeated")
        assert refusal_of(client) is Refusal.SERVICE_REFUSED


def test_another_key_than_asked_for_is_refused_and_its_plaintext_wiped() -> None:
    plaintext = fresh(KEY)
    with kms() as client, Stubber(client) as stub:
        stub.add_response("decrypt", {"Plaintext": plaintext, "KeyId": ARN.replace("1234abcd", "00000000")})
        assert refusal_of(client) is Refusal.SERVICE_REFUSED
    assert plaintext == bytes(32)


def test_a_service_out_of_reach_is_told_from_one_that_refuses() -> None:
    with kms(endpoint_url="http://127.0.0.1:9") as client:  # the discard port: nobody listens
        assert refusal_of(client) is Refusal.SERVICE_UNREACHABLE


def test_wrapping_makes_the_entry_that_a_manifest_holds() -> None:
    with kms() as client, Stubber(client) as stub:
        answer = {"CiphertextBlob": b"ciphertext", "KeyId": ARN}
        stub.add_response("encrypt", answer, {**SENT, "Plaintext": bytearray(KEY)})
        entry = wrap(client, ARN, CONTEXT, bytearray(KEY))
    assert (bytes.fromhex(entry.ciphertext), entry.encapsulated, entry.scheme) == (b"ciphertext", "", "kms")
    check((entry,))


def test_a_refused_wrapping_says_so() -> None:
    with kms() as client, Stubber(client) as stub:
        stub.add_client_error("encrypt", "AccessDeniedException")
        with pytest.raises(KeyRefused) as raised:
            wrap(client, ARN, CONTEXT, bytearray(KEY))
    assert raised.value.refusal is Refusal.SERVICE_REFUSED
