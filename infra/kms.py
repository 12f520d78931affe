"""AWS KMS as a package's key service: wrapping for the vendor, unwrapping for a container in its own VPC.

Owns: the two KMS calls and what their errors mean.
Must not know: of a package, more than what a wrapped key is bound to.
Invariant: every call carries the encryption context of FORMAT.md 7.2, so that a grant limited to it opens one
package and no other.

The vendor keeps the KMS key; the customer's role gets a grant with `EncryptionContextEquals`, and retiring it
revokes the next start. An isolated endpoint reaches no KMS. The SDK's own buffers hold the key as base64
until the process reuses them: only the copy that this file gets is wiped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError

from model_package.recipients import KeyContext, Recipient, Scheme, key_id
from model_package.refusal import KeyRefused, Refusal
from model_package.secret import take_over, wipe

ALGORITHM: Final = "SYMMETRIC_DEFAULT"  # AES-256-GCM; the only one that has an encryption context


class KmsDecrypter:
    """`model_package.providers.Decrypter` on a boto3 KMS client, which stays the caller's to close."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def decrypt(self, key_arn: str, ciphertext: bytes, context: Mapping[str, str]) -> bytearray:
        """Return what was encrypted under `key_arn` with `context`; the caller wipes it.

        Raises KeyRefused with SERVICE_REFUSED or SERVICE_UNREACHABLE.
        """
        answer = _called(
            self._client.decrypt,
            CiphertextBlob=ciphertext,
            EncryptionAlgorithm=ALGORITHM,
            EncryptionContext=dict(context),
            KeyId=key_arn,
        )
        key = take_over(answer.pop("Plaintext"))
        if answer.get("KeyId") != key_arn:  # the service says which key it used
            wipe(key)
            raise KeyRefused(Refusal.SERVICE_REFUSED)
        return key


def wrap(client: Any, key_arn: str, context: KeyContext, data_key: bytearray) -> Recipient:
    """Return the manifest's entry for `data_key`, encrypted under `key_arn` for the package of `context`.

    Raises KeyRefused with SERVICE_REFUSED or SERVICE_UNREACHABLE.
    """
    answer = _called(
        client.encrypt,
        EncryptionAlgorithm=ALGORITHM,
        EncryptionContext=context.encryption_context(),
        KeyId=key_arn,
        Plaintext=data_key,
    )
    return Recipient(
        ciphertext=answer["CiphertextBlob"].hex(),
        encapsulated="",
        key_id=key_id(Scheme.KMS, key_arn.encode("ascii")),
        scheme=Scheme.KMS,
    )


def _called(operation: Any, **arguments: Any) -> dict[str, Any]:
    refusal = None
    answer: dict[str, Any] = {}
    try:
        answer = operation(**arguments)
    except ClientError:
        refusal = Refusal.SERVICE_REFUSED
    except BotoCoreError:  # no route, no credentials, no answer
        refusal = Refusal.SERVICE_UNREACHABLE
    if refusal is not None:  # outside the handlers: the SDK's exceptions hold the request
        raise KeyRefused(refusal)
    return answer
