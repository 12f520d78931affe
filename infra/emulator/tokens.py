"""Bearer tokens of the OpenAI route: a presigned `CallWithBearerToken`, base64, behind a fixed prefix.

Owns: making and checking them. Must not know: sockets, where keys come from.
Invariant: a token is a secret: it is in no repr, log or error text.

Source: the token generator of the SageMaker SDK (`sagemaker-core` 2.27); `Version` is added after signing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

from infra.emulator.errors import ServiceError, missing_token
from infra.emulator.sigv4 import (
    ALGORITHM,
    SERVICE,
    SKEW_S,
    Keys,
    SignedRequest,
    canonical_query,
    canonical_request,
    format_timestamp,
    parse_timestamp,
    signature,
)

PREFIX: Final = "sagemaker-api-key-"
HOST: Final = "sagemaker.amazonaws.com"
EXPIRES_S: Final = 43_200  # longest life of a token, 12 hours
TOKEN_CHARACTERS: Final = 8192  # session tokens are long; beyond this nothing is decoded

_EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()
_CREDENTIAL: Final = re.compile(r"([^/]+)/([0-9]{8})/([^/]+)/([^/]+)/aws4_request")
_REQUIRED: Final = frozenset(
    {
        "Action",
        "X-Amz-Algorithm",
        "X-Amz-Credential",
        "X-Amz-Date",
        "X-Amz-Expires",
        "X-Amz-SignedHeaders",
        "X-Amz-Signature",
    }
)


def make(keys: Keys, region: str, expires_s: int, now_s: float) -> str:
    """Return a token for `region` that expires `expires_s` after `now_s`.

    Raises ValueError for a life outside 1 to 43,200 seconds or an empty region.
    """
    if not 0 < expires_s <= EXPIRES_S:
        raise ValueError(f"a token lives 1 to {EXPIRES_S} seconds")
    if not region:
        raise ValueError("a token needs a region")
    timestamp = format_timestamp(now_s)
    scope = f"{timestamp[:8]}/{region}/{SERVICE}/aws4_request"
    pairs = {  # in the order the SDK writes them: tokens differ in date and signature alone
        "Action": "CallWithBearerToken",
        "X-Amz-Algorithm": ALGORITHM,
        "X-Amz-Credential": f"{keys.access_key_id}/{scope}",
        "X-Amz-Date": timestamp,
        "X-Amz-Expires": str(expires_s),
        "X-Amz-SignedHeaders": "host",
    }
    if keys.session_token:
        pairs["X-Amz-Security-Token"] = keys.session_token
    made = signature(keys, scope, timestamp, _canonical(pairs))
    query = urlencode({**pairs, "X-Amz-Signature": made, "Version": "1"}, quote_via=quote, safe="-_.~")
    url = f"{HOST}/?{query}"
    return PREFIX + base64.b64encode(url.encode()).decode()


def check(authorization: str | None, now_s: float, keys: Keys | None) -> None:
    """Raise ServiceError (403) unless `authorization` bears a current token; with `keys`, one they signed."""
    if not authorization:
        raise missing_token()
    pairs = _decode(authorization)
    expires = pairs["X-Amz-Expires"]
    if not re.fullmatch("[0-9]{1,5}", expires) or not 0 < int(expires) <= EXPIRES_S:
        raise _denied("its life is out of range")
    start_s = parse_timestamp(pairs["X-Amz-Date"])
    if not start_s - SKEW_S <= now_s < start_s + int(expires):
        raise _denied("it has expired or is not yet current")
    if keys is not None:
        _check_signature(pairs, keys)


def _decode(authorization: str) -> dict[str, str]:
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or len(token) > TOKEN_CHARACTERS or not token.startswith(PREFIX):
        raise _denied("it is not a bearer token of this service")
    try:
        url = base64.b64decode(token[len(PREFIX) :], validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise _denied("it cannot be decoded") from error
    address, _, query = url.partition("?")
    listed = parse_qsl(query, keep_blank_values=True)
    pairs = dict(listed)
    if address != f"{HOST}/" or len(pairs) != len(listed) or _REQUIRED - pairs.keys():
        raise _denied("it is not a presigned request of this service")
    if pairs["Action"] != "CallWithBearerToken" or pairs["X-Amz-Algorithm"] != ALGORITHM:
        raise _denied("it was made for another action")
    return pairs


def _check_signature(pairs: dict[str, str], keys: Keys) -> None:
    match = _CREDENTIAL.fullmatch(pairs["X-Amz-Credential"])
    if match is None or match[1] != keys.access_key_id or match[4] != SERVICE:
        raise _denied("it was made with other keys")
    if not pairs["X-Amz-Date"].startswith(match[2]) or pairs["X-Amz-SignedHeaders"] != "host":
        raise _denied("its scope and its date differ")
    scope = f"{match[2]}/{match[3]}/{SERVICE}/aws4_request"
    signed = {key: value for key, value in pairs.items() if key not in ("X-Amz-Signature", "Version")}
    made = signature(keys, scope, pairs["X-Amz-Date"], _canonical(signed))
    if not hmac.compare_digest(made.encode(), pairs["X-Amz-Signature"].encode()):
        raise _denied("its signature is wrong")


def _canonical(pairs: dict[str, str]) -> str:
    request = SignedRequest("POST", "/", canonical_query(pairs.items()), {"host": HOST}, b"")
    return canonical_request(request, ["host"], _EMPTY_SHA256)


def _denied(reason: str) -> ServiceError:
    return ServiceError(403, "AccessDeniedException", f"The bearer token was refused: {reason}.")
