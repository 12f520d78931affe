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
ATTRIBUTES_KEY: Final = "HTTP_X_AMZN_SAGEMAKER_CUSTOM_ATTRIBUTES"

_ECHOED = re.compile(r"[A-Za-z0-9._=-]{1,1024}")
_ATTRIBUTES = re.compile(r"[ -~]{0,1024}")
_JSON_CONTENT = re.compile(r'application/json[ \t]*(?:;[ \t]*charset="?utf-8"?[ \t]*)?', re.IGNORECASE)


class Keyhole:
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


def echoed_attributes(environ: Mapping[str, Any]) -> str | None:
    """Return the attributes as a reply may repeat them, or None."""
    attributes: str = environ.get(ATTRIBUTES_KEY, "")
    return attributes if _ECHOED.fullmatch(attributes) else None


def check_content(environ: Mapping[str, Any]) -> None:
    """Refuse a body that does not say it is plain JSON; saying nothing counts as JSON."""
    encoding = environ.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise ApiError(Code.CONTENT_ENCODING)
    content_type = environ.get("CONTENT_TYPE", JSON_TYPE)
    if not _JSON_CONTENT.fullmatch(content_type.strip()):
        raise ApiError(Code.MEDIA_TYPE)
