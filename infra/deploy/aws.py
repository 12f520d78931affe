"""Clients of AWS whose every request is checked against the service model before it is sent.

Owns: sessions, time limits, retries, turning the SDK's errors into ours. Must not know: what is deployed.
Invariant: a request that the model refuses is not sent; text of AWS's errors reaches the operator who called
and nobody else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from infra.bearer import missing_sdk, no_credentials
from infra.report import CommandError, ExitCode

CONNECT_S: Final = 5
READ_S: Final = 70
ATTEMPTS: Final = 3
DENIED: Final = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "UnauthorizedOperation",
        "AuthorizationError",
        "AuthorizationErrorException",
        "403",
    }
)


class Aws:
    """A session in one region; `client` makes each service's client once."""

    def __init__(self, region: str | None, session: Any = None) -> None:
        """Raise CommandError without the SDK or without a region."""
        try:
            import boto3
        except ModuleNotFoundError as error:
            raise missing_sdk() from error
        self._session = session or boto3.Session(region_name=region)
        if not self._session.region_name:
            raise CommandError(ExitCode.ENVIRONMENT_MISSING, "no_region", "no region is set", "pass --region")
        self.region: str = self._session.region_name
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        """Return the client of `service`, with the request check in place."""
        if service not in self._clients:
            from botocore.config import Config

            retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
            config = Config(connect_timeout=CONNECT_S, read_timeout=READ_S, retries=retries)
            made = self._session.client(service, config=config)
            made.meta.events.register_first("before-parameter-build", check_request)
            self._clients[service] = made
        return self._clients[service]

    def close(self) -> None:
        """Close all clients."""
        for made in self._clients.values():
            made.close()


def check_request(params: dict[str, Any], model: Any, **_: Any) -> None:
    """Raise CommandError when the service model refuses a request; `model` is the operation's."""
    from infra.validation import faults

    found = faults(model.service_model.service_name, model.name, params)
    if found:
        raise CommandError(
            ExitCode.VERIFICATION_FAILED,
            "request_refused",
            f"`{model.name}` was not sent: {found[0]}",
            f"{len(found) - 1} more faults" if len(found) > 1 else "",
        )


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what the SDK raises into CommandError."""
    import botocore.exceptions as refusals

    try:
        yield
    except refusals.ClientError as error:
        told = error.response.get("Error", {})
        code = str(told.get("Code", "unknown"))
        hint = f"the caller needs the right to `{error.operation_name}`" if code in DENIED else ""
        raise CommandError(ExitCode.AWS_REFUSED, code, str(told.get("Message", "")), hint) from error
    except (refusals.NoCredentialsError, refusals.PartialCredentialsError) as error:
        raise no_credentials() from error
    except (refusals.ConnectionError, refusals.HTTPClientError) as error:
        hint = "check the network, --region and AWS_ENDPOINT_URL"
        raise CommandError(
            ExitCode.ENVIRONMENT_MISSING, "unreachable", "AWS does not answer", hint
        ) from error
    except refusals.WaiterError as error:
        raise CommandError(
            ExitCode.AWS_REFUSED, "not_reached", "the stack did not reach the state", "see `deploy status`"
        ) from error
