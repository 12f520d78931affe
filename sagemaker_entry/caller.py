"""What the headers of a request must say before its body is looked at.

Owns: the API key, content type and encoding, the platform's custom attributes.
Must not know: routes, bodies, Flask; it reads a WSGI environment.
Invariant: a check either passes or raises ApiError; none of them waits.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Final

from sagemaker_entry.dialects.presenter import JSON_TYPE
from sagemaker_entry.errors import ApiError, Code

ATTRIBUTES: Final = "X-Amzn-SageMaker-Custom-Attributes"
# Headers that ask for something else than the one served model; the first is of multi-model endpoints.
TARGET_MODEL_KEY: Final = "HTTP_X_AMZN_SAGEMAKER_TARGET_MODEL"
ADAPTER_KEYS: Final = (
    "HTTP_X_AMZN_SAGEMAKER_ADAPTER_IDENTIFIER",
    "HTTP_X_AMZN_SAGEMAKER_ADAPTER_ALIAS",
)
ATTRIBUTES_KEY: Final = "HTTP_" + ATTRIBUTES.upper().replace("-", "_")

_ECHOED = re.compile(r"[A-Za-z0-9._=-]{1,1024}")
_ATTRIBUTES = re.compile(r"[ -~]{0,1024}")
_LINES_CONTENT = re.compile(
    r'application/(?:jsonlines|x-ndjson)[ \t]*(?:;[ \t]*charset="?utf-8"?[ \t]*)?', re.IGNORECASE
)
_JSON_CONTENT = re.compile(r'application/json[ \t]*(?:;[ \t]*charset="?utf-8"?[ \t]*)?', re.IGNORECASE)


class ApiKey:
    """Compares what a caller brings with the one API key; None lets everybody in."""

    def __init__(self, key: str | None) -> None:
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()

    def check(self, environ: Mapping[str, Any]) -> None:
        """Raises ApiError UNAUTHORIZED."""
        if self._key is None:
            return
        scheme, _, key = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        if not hmac.compare_digest(digest, self._key) or scheme.lower() != "bearer":
            raise ApiError(Code.UNAUTHORIZED)


def check_attributes(environ: Mapping[str, Any]) -> None:
    """Raises ApiError BAD_REQUEST for attributes the platform would not forward."""
    if not _ATTRIBUTES.fullmatch(environ.get(ATTRIBUTES_KEY, "")):
        raise ApiError(Code.BAD_REQUEST)


def check_target(environ: Mapping[str, Any]) -> None:
    """Raise ApiError for headers that name a model or an adapter: none is registered beside the served model.

    Answering from the served model instead would be an answer of the wrong one.
    """
    if environ.get(TARGET_MODEL_KEY):
        raise ApiError(Code.MODEL_NOT_FOUND)
    if any(environ.get(key) for key in ADAPTER_KEYS):
        raise ApiError(Code.ADAPTER_NOT_FOUND)


def names_target(environ: Mapping[str, Any]) -> bool:
    """Return whether a header names a model or an adapter."""
    return any(environ.get(key) for key in (TARGET_MODEL_KEY, *ADAPTER_KEYS))


def echoed_attributes(environ: Mapping[str, Any]) -> str | None:
    """Return the attributes as a reply may repeat them, or None."""
    attributes: str = environ.get(ATTRIBUTES_KEY, "")
    return attributes if _ECHOED.fullmatch(attributes) else None


def check_content(environ: Mapping[str, Any], *, lines: bool = False) -> None:
    """Refuse a body that does not say it is plain JSON; saying nothing counts as JSON.

    With `lines`, JSON lines are taken too.
    """
    encoding = environ.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise ApiError(Code.CONTENT_ENCODING)
    if lines and is_lines(environ):
        return
    content_type = environ.get("CONTENT_TYPE", JSON_TYPE)
    if not _JSON_CONTENT.fullmatch(content_type.strip()):
        raise ApiError(Code.MEDIA_TYPE)


def is_lines(environ: Mapping[str, Any]) -> bool:
    """Return whether the body says that it is JSON lines."""
    return _LINES_CONTENT.fullmatch(environ.get("CONTENT_TYPE", "").strip()) is not None
