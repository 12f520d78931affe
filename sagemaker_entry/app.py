"""The routes: one Flask application per worker.

Owns: paths and methods, who may call, content types, errors as replies, the fixed reply headers.
Must not know: sockets, the engine's protocol, what any body field means.
Invariant: every reply that is not a success comes from the error table, in the caller's dialect; a path
that is not listed here does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final, get_args

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import Rule

from sagemaker_entry import log, session_control
from sagemaker_entry.caller import (
    ATTRIBUTES,
    ApiKey,
    check_attributes,
    check_content,
    check_target,
    echoed_attributes,
    is_lines,
)
from sagemaker_entry.dialects.choose import GENERATING, Dialect, DialectSetting, Route, error_dialect
from sagemaker_entry.dialects.listings import Listed, ServerFacts, info_body, model_body, models_body
from sagemaker_entry.dialects.presenter import JSON_TYPE, error_body
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ENVIRON_KEY, ClientLeft, Exchange
from sagemaker_entry.health import Health
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.replies import Replies
from sagemaker_entry.service import Service
from sagemaker_entry.sessions import Sessions
from sagemaker_entry.settings import Settings
from sagemaker_entry.surplus import Surplus
from sagemaker_entry.unlocking import VERBS, Unlocking

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
LOCKDOWN: Final = "Strongroom-Lockdown"  # on a green ping, whose body is empty by contract
SEAL: Final = "Strongroom-Seal"  # likewise: sealed, locked or plaintext
PAYLOAD_MB: Final = 6  # what the platform forwards; larger bodies only reach us directly
TRANSFORM_BUDGET_MB: Final = 100  # MaxConcurrentTransforms x MaxPayloadInMB may not exceed it
OPEN_PATHS: Final = frozenset({"/ping", "/health"})  # answered without a key, like GET /


class App:
    """Holds what the views need; `wsgi` is the callable for the worker."""

    def __init__(
        self,
        settings: Settings,
        service: Service,
        health: Health,
        metrics: Metrics,
        facts: ServerFacts,
        loaded_s: int,
        key: str | None,
        sessions: Sessions | None = None,
        unlocking: Unlocking | None = None,
    ) -> None:
        self._unlocking = unlocking
        self._settings = settings
        self._service = service
        self._health = health
        self._metrics = metrics
        self._facts = facts
        self._models = (Listed(settings.name, loaded_s),)
        self._key = ApiKey(key)
        self._sessions = sessions
        dialect = settings.dialect
        self._dialect: DialectSetting = dialect if dialect in get_args(DialectSetting) else "auto"  # type: ignore[assignment]
        self._replies = Replies(settings, service, metrics, self._dialect, facts.fingerprint)
        self.wsgi = Surplus(self._build(), health, self._key, self._replies)

    def _build(self) -> Flask:
        app = Flask("strongroom", static_folder=None)
        app.url_map.strict_slashes = True
        app.url_map.merge_slashes = False
        app.url_map.redirect_defaults = False
        app.before_request(self._before)
        app.after_request(self._after)
        app.register_error_handler(Exception, self._failed)
        self._add(app, "/ping", self._ping, "GET", "POST")
        self._add(app, "/health", self._ping, "GET")
        self._add(app, "/", self._ping, "GET")
        for path, route in GENERATING.items():
            self._add(app, path, self._generating(route), "POST")
        self._add(app, "/tokenize", lambda: self._tokenize(Route.TOKENIZE), "POST")
        self._add(app, "/chat_tokenize", lambda: self._tokenize(Route.CHAT_TOKENIZE), "POST")
        for prefix in ("", "/openai"):
            self._add(app, prefix + "/v1/models", lambda: _json(models_body(self._models)), "GET")
            self._add(app, prefix + "/v1/models/<path:name>", self._model, "GET")
        self._add(app, "/info", lambda: _json(info_body(self._service.limits(), self._facts)), "GET")
        self._add(app, "/metrics", self._metrics_page, "GET")
        self._add(app, "/execution-parameters", self._execution_parameters, "GET")
        return app

    @staticmethod
    def _add(app: Flask, path: str, view: Callable[..., Response], *methods: str) -> None:
        # without automatic OPTIONS: every method that is not listed is 405
        app.add_url_rule(
            path,
            endpoint=f"{methods[0]} {path}",
            view_func=view,
            methods=list(methods),
            provide_automatic_options=False,
        )

    # Round every request

    def _before(self) -> None:
        exchange = current()
        exchange.route = template(request.url_rule, request.path)
        check_attributes(request.environ)
        self._check_key()
        if request.environ["PATH_INFO"].startswith("//"):
            raise ApiError(Code.NOT_FOUND)  # the router would look past all slashes but one
        if exchange.draining() and exchange.route not in OPEN_PATHS:
            raise ApiError(Code.DRAINING, retry_after_s=1)

    def _check_key(self) -> None:
        if request.path not in OPEN_PATHS and (request.path != "/" or request.method != "GET"):
            self._key.check(request.environ)

    def _after(self, response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        if (attributes := echoed_attributes(request.environ)) is not None:
            response.headers[ATTRIBUTES] = attributes
        return response

    def _failed(self, error: Exception) -> Response:
        if isinstance(error, ClientLeft):
            raise error  # the connection closes without a word
        if isinstance(error, HTTPException):
            wrong_method = isinstance(error, MethodNotAllowed)
            error = ApiError(Code.METHOD_NOT_ALLOWED if wrong_method else Code.NOT_FOUND)
        exchange = current()
        if not isinstance(error, ApiError):
            log.write("error", "request_failed", id=exchange.id, kind=log.exception_name())
            error = ApiError(Code.INTERNAL)
        return self._replies.error(error, exchange, self._error_dialect())

    def _error_dialect(self) -> Dialect:
        route = GENERATING.get(request.path)
        if route is None and request.path in ("/tokenize", "/chat_tokenize"):
            route = Route(request.path)
        return error_dialect(route, self._dialect)

    # Views

    def _ping(self) -> Response:
        error = self._health.error()
        if error is None or error.code is Code.LOCKED:  # no call would ever bring the key to a red endpoint
            healthy = Response(b"", 200)
            del healthy.headers["Content-Type"]
            healthy.headers[LOCKDOWN] = self._health.lock().value
            healthy.headers[SEAL] = self._health.seal().value
            return healthy
        body, _ = error_body(Dialect.OPENAI_CHAT, error, current().public_id)
        states = {"lockdown": self._health.lock().value, "seal": self._health.seal().value}
        detail = self._health.phase() | states
        response = _json(json.dumps(json.loads(body) | detail).encode())
        response.status_code = error.status
        response.headers["Retry-After"] = str(error.retry_after_s)
        current().error_code = error.code.value
        return response

    def _generating(self, route: Route) -> Callable[[], Response]:
        def view() -> Response:
            invoked = route is Route.INVOCATIONS
            verb = VERBS.get(request.environ.get("CONTENT_TYPE", "")) if self._unlocking else None
            if self._unlocking is not None and verb is not None and invoked:
                return _json(self._unlocking.answer(verb, current().body.read()))
            check_content(request.environ, lines=invoked)
            check_target(request.environ)
            body = current().body.read()
            self._check_ready()
            lines = invoked and is_lines(request.environ)
            if invoked:
                control = b"" if lines else body  # no line opens or closes anything
                controlled = session_control.answer(request.environ, control, self._sessions)
                if controlled is not None:
                    return controlled
            if lines:
                return self._replies.lines(body, current())
            return self._replies.generate(route, body, current())

        return view

    def _tokenize(self, route: Route) -> Response:
        check_content(request.environ)
        body = current().body.read()
        self._check_ready()
        return self._replies.tokenize(route, body, current())

    def _check_ready(self) -> None:
        error = self._health.error()
        if error is not None:
            raise error

    def _model(self, name: str) -> Response:
        return _json(model_body(name, self._models))

    def _metrics_page(self) -> Response:
        text = self._metrics.text(self._settings.name, self._health.engine_series())
        return Response(text, 200, content_type=METRICS_TYPE)

    def _execution_parameters(self) -> Response:
        most = min(TRANSFORM_BUDGET_MB // PAYLOAD_MB, self._settings.max_concurrent_requests)
        if self._health.error() is None:
            most = min(most, self._service.running_limit())
        return _json(
            json.dumps(
                {
                    "MaxConcurrentTransforms": max(1, most),
                    "BatchStrategy": "MULTI_RECORD",
                    "MaxPayloadInMB": PAYLOAD_MB,
                }
            ).encode()
        )


def current() -> Exchange:
    """Return the exchange of the request being served."""
    exchange: Exchange = request.environ[ENVIRON_KEY]
    return exchange


def template(rule: Rule | None, path: str) -> str:
    """Return the route template to count and log a request under; never the path a client typed."""
    if rule is None:
        return "other"
    if path in GENERATING:
        return GENERATING[path].value
    text = str(rule.rule).removeprefix("/openai")
    return "/v1/models" if text.startswith("/v1/models") else text


def _json(body: bytes) -> Response:
    return Response(body, 200, content_type=JSON_TYPE)
