"""The short way out: a full engine's surplus is refused without the framework.

Owns: telling an ordinary surplus request from everything else.
Must not know: what a refusal says; Flask. It calls any WSGI application.
Invariant: it refuses with the reply the application would have given, or hands the request on untouched.

At several times its capacity an endpoint refuses more requests than it serves, on the cores that serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Protocol

from sagemaker_entry.body import LARGE_BODY_BYTES
from sagemaker_entry.caller import ATTRIBUTES_KEY, ApiKey, check_content, names_target
from sagemaker_entry.dialects.choose import GENERATING, Route
from sagemaker_entry.errors import ApiError
from sagemaker_entry.exchange import ENVIRON_KEY, Exchange
from sagemaker_entry.session_control import SESSION_KEY

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Readiness(Protocol):
    """What of Health is used here."""

    def error(self) -> ApiError | None: ...

    def full_s(self) -> int: ...


class Words(Protocol):
    """What of Replies is used here."""

    def refuse(
        self, route: Route, exchange: Exchange, full_s: int
    ) -> tuple[int, list[tuple[str, str]], bytes]: ...


class Surplus:
    """The WSGI callable in front of `application`."""

    def __init__(self, application: Application, health: Readiness, key: ApiKey, words: Words) -> None:
        self._application = application
        self._health = health
        self._key = key
        self._words = words

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        route = GENERATING.get(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] == "POST" else None
        full_s = self._health.full_s() if route is not None else 0
        if route is None or not full_s or not self._ordinary(environ):
            return self._application(environ, start_response)
        exchange: Exchange = environ[ENVIRON_KEY]
        exchange.route = route.value
        status, headers, body = self._words.refuse(route, exchange, full_s)
        headers.append(("X-Content-Type-Options", "nosniff"))
        start_response(f"{status} {HTTPStatus(status).phrase.upper()}", headers)
        return (body,)

    def _ordinary(self, environ: dict[str, Any]) -> bool:
        """True when nothing but the lack of room can be said before the body is read."""
        if not environ.get("CONTENT_LENGTH", "").isdecimal() or ATTRIBUTES_KEY in environ:
            return False
        if SESSION_KEY in environ or names_target(environ):
            return False
        if int(environ["CONTENT_LENGTH"]) > LARGE_BODY_BYTES or environ[ENVIRON_KEY].draining():
            return False
        try:
            self._key.check(environ)
            check_content(environ)
        except ApiError:
            return False
        return self._health.error() is None
