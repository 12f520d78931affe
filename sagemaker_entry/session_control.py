"""Session control as the platform speaks it: bodies with `requestType`, and the header of a request in one.

Owns: the headers, the two requests, their replies. Must not know: the table behind the ids, generation.
Invariant: a request in a session that is not open is refused before it runs; nothing of it is remembered.

Sources differ on the header that carries a new id (contract, section 7): both are set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from flask import Response

from sagemaker_entry import strict_json
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.sessions import Sessions

SESSION: Final = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION: Final = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION: Final = "X-Amzn-SageMaker-Closed-Session-Id"
SESSION_KEY: Final = "HTTP_" + SESSION.upper().replace("-", "_")
CONTROL_BYTES: Final = 1024  # a control body has one short field; a larger body is none

_KEY: Final = re.compile(rb'"requestType"')


def answer(environ: Mapping[str, Any], body: bytes, sessions: Sessions | None) -> Response | None:
    """Return the reply to a body that controls a session, None for any other body; raises ApiError.

    For any other body the session it is in, if it names one, has been checked.
    """
    given: str | None = environ.get(SESSION_KEY)
    control = _control(body)
    if control is None:
        if given is not None:
            if sessions is None:
                raise ApiError(Code.SESSION_HEADER)
            sessions.check(given)
        return None
    if sessions is None:
        raise ApiError(Code.SESSIONS_OFF)
    if list(control) != ["requestType"]:
        rule = "a body with `requestType` has no other field"
        raise ApiError(Code.INVALID_REQUEST, param="requestType", rule=rule)
    if control["requestType"] == "NEW_SESSION":
        session, shown = sessions.open()
        return _reply(f"Session {session} created", {SESSION: shown, NEW_SESSION: shown})
    if control["requestType"] == "CLOSE":
        sessions.close(given or "")
        return _reply(f"Session {given} closed", {CLOSED_SESSION: given or ""})
    raise ApiError(Code.INVALID_VALUE, param="requestType", rule="one of NEW_SESSION, CLOSE")


def _control(body: bytes) -> dict[str, Any] | None:
    if len(body) > CONTROL_BYTES or _KEY.search(body) is None:
        return None
    value = strict_json.loads(body)
    return value if isinstance(value, dict) and "requestType" in value else None


def _reply(text: str, headers: dict[str, str]) -> Response:
    return Response(text, 200, headers, content_type="text/plain; charset=utf-8")
