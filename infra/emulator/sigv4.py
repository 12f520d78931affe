"""AWS Signature Version 4, for checking what clients sign and for making bearer tokens.

Owns: canonical forms and the two places a signature is carried (header, query). Must not know: sockets,
routes.
Invariant: signatures and keys appear in no error text; they are compared in constant time.

Source: "Signature Version 4 signing process" in the AWS General Reference; botocore 1.44.5 is the second
implementation that the tests compare with.
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote

from infra.emulator.errors import ServiceError, missing_token

ALGORITHM: Final = "AWS4-HMAC-SHA256"
SERVICE: Final = "sagemaker"
SKEW_S: Final = 300  # how far a client's clock may be off

_AUTHORIZATION: Final = re.compile(
    rf"{ALGORITHM} Credential=(?P<key>[^/,\s]+)/(?P<date>[0-9]{{8}})/(?P<region>[^/,\s]+)"
    r"/(?P<service>[^/,\s]+)/aws4_request,\s*SignedHeaders=(?P<headers>[a-z0-9;-]+),\s*Signature=(?P<signature>[0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True)
class Keys:
    """An access key; the secret and the session token are kept out of the repr."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """What a client signed, as it arrived: `path` and `query` still encoded, header names lower case."""

    method: str
    path: str = field(repr=False)
    query: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)


def signature(keys: Keys, scope: str, timestamp: str, canonical: str) -> str:
    """Return the hex signature of a canonical request; `scope` is date/region/service/aws4_request."""
    key = b"AWS4" + keys.secret_access_key.encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = "\n".join((ALGORITHM, timestamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    return hmac.digest(key, text.encode(), "sha256").hex()


def canonical_query(pairs: Iterable[tuple[str, str]]) -> str:
    """Return decoded `pairs` encoded and sorted as they are signed."""
    encoded = sorted((quote(key, safe="-_.~"), quote(value, safe="-_.~")) for key, value in pairs)
    return "&".join(f"{key}={value}" for key, value in encoded)


def canonical_request(request: SignedRequest, signed: Iterable[str], payload_sha256: str) -> str:
    """Return the text that is hashed and signed; `signed` names the headers, sorted."""
    signed = list(signed)
    lines = [f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in signed]
    return "\n".join(
        (
            request.method,
            quote(request.path, safe="/~"),
            canonical_query(parse_qsl(request.query, keep_blank_values=True)),
            "".join(lines),
            ";".join(signed),
            payload_sha256,
        )
    )


def check_presence(authorization: str | None) -> None:
    """Raise ServiceError (403) unless there is a well-formed signature, of any key."""
    if not authorization:
        raise missing_token()
    if _AUTHORIZATION.fullmatch(authorization) is None:
        raise ServiceError(403, "IncompleteSignatureException", "the Authorization header is malformed")


def verify(request: SignedRequest, keys: Keys, now_s: float) -> None:
    """Raise ServiceError (403) unless `request` carries a current signature made with `keys`."""
    authorization = request.headers.get("authorization")
    check_presence(authorization)
    match = _AUTHORIZATION.fullmatch(authorization or "")
    assert match is not None, "check_presence has matched the same text"
    timestamp = request.headers.get("x-amz-date", "")
    if match["key"] != keys.access_key_id:
        raise ServiceError(
            403,
            "UnrecognizedClientException",
            "The security token included in the request is invalid.",
        )
    age_s = now_s - parse_timestamp(timestamp)
    if abs(age_s) > SKEW_S or not timestamp.startswith(match["date"]):
        raise _invalid("Signature expired or not yet current.")
    signed = match["headers"].split(";")
    if match["service"] != SERVICE or "host" not in signed or "x-amz-date" not in signed:
        raise _invalid("The signature has the wrong scope or leaves out a header that must be signed.")
    scope = f"{match['date']}/{match['region']}/{SERVICE}/aws4_request"
    canonical = canonical_request(request, signed, hashlib.sha256(request.body).hexdigest())
    if not hmac.compare_digest(signature(keys, scope, timestamp, canonical), match["signature"]):
        raise _invalid("The request signature we calculated does not match the signature you provided.")


def parse_timestamp(text: str) -> float:
    """Return the Unix time of `YYYYMMDDThhmmssZ`, 0.0 (long past) when it is malformed."""
    try:
        return float(calendar.timegm(time.strptime(text, "%Y%m%dT%H%M%SZ")))
    except ValueError:
        return 0.0


def format_timestamp(now_s: float) -> str:
    """Return Unix time `now_s` as `YYYYMMDDThhmmssZ`."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))


def _invalid(message: str) -> ServiceError:
    return ServiceError(403, "InvalidSignatureException", message)
