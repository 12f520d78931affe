"""What the platform itself answers when it cannot or will not pass an answer on.

Owns: statuses, error types and message forms of the runtime service. Must not know: sockets, routes.
Invariant: the only text from elsewhere is the container's own error body, cut to the model's limit, sent to
the caller whose request it answers and nowhere else.

Source: service model of `sagemaker-runtime` (botocore 1.44.5); message forms as in clients' error reports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

from infra.emulator.eventstream import MESSAGE_CHARACTERS

ACCOUNT: Final = "000000000000"

TIMED_OUT: Final = (
    "Your invocation timed out while waiting for a response from container primary. Review the latency "
    "metrics for each container in Amazon CloudWatch, resolve the issue, and try again."
)
BROKEN: Final = "The connection to container primary was closed before its response was complete."
PLATFORM_FAILED: Final = "The stream failed because of an internal error of the platform."
TOO_LARGE: Final = "The response of container primary is larger than {limit} bytes."


class ServiceError(Exception):
    """An answer of the platform's own: `status`, `kind` (the error type) and `message`."""

    def __init__(self, status: int, kind: str | None, message: str, **extra: Any) -> None:
        super().__init__(kind)
        self.status = status
        self.kind = kind
        self.message = message
        self.extra = extra

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers that name the error to an SDK."""
        typed = [("x-amzn-errortype", self.kind)] if self.kind else []
        return [("Content-Type", "application/json"), *typed]

    def body(self) -> bytes:
        """Return the JSON document of the error."""
        return json.dumps({"Message": self.message[:MESSAGE_CHARACTERS], **self.extra}).encode()


def validation_error(message: str) -> ServiceError:
    """Return the error for a request that breaks a rule of the service model."""
    return ServiceError(400, "ValidationError", message)


def endpoint_not_found(name: str) -> ServiceError:
    """Return the error for an endpoint that does not exist."""
    return validation_error(f"Endpoint {name} of account {ACCOUNT} not found.")


def missing_token() -> ServiceError:
    """Return the error for a request without any signature."""
    return ServiceError(403, "MissingAuthenticationTokenException", "Missing Authentication Token")


def body_too_large(limit_bytes: int) -> ServiceError:
    """Return the error for a request body above the limit; it has no error type, SDKs report `413`."""
    return ServiceError(413, None, f"HTTP content length exceeded {limit_bytes} bytes.")


def busy() -> ServiceError:
    """Return the error for a connection beyond the number served at once."""
    return ServiceError(503, "ServiceUnavailable", "the emulator serves no more connections at once")


@dataclass(frozen=True, slots=True)
class Failure:
    """How a container failed: its status (0: no whole answer) and its body's text."""

    status: int
    text: str = field(repr=False)


def model_error(failure: Failure, endpoint: str, region: str) -> ServiceError:
    """Return the 424 that stands for a container's failure."""
    side = "client" if 400 <= failure.status < 500 else "server"
    group = f"/aws/sagemaker/Endpoints/{endpoint}"
    original = failure.text[:MESSAGE_CHARACTERS]
    head = f"Received {side} error ({failure.status}) from primary with message "
    tail = f". See log group {group} in account {ACCOUNT} for more information."
    # The container's text gives way, so that the message keeps its form.
    shown = original[: MESSAGE_CHARACTERS - len(head) - len(tail) - 2]
    return ServiceError(
        424,
        "ModelError",
        f'{head}"{shown}"{tail}',
        OriginalStatusCode=failure.status,
        OriginalMessage=original,
        LogStreamArn=f"arn:aws:logs:{region}:{ACCOUNT}:log-group:{group}",
    )
