"""The routes: one Flask application per worker.

Owns: paths and methods, who may call, content types, errors as replies, the fixed reply headers.
Must not know: sockets, the engine's protocol, what any body field means.
Invariant: every reply that is not a success comes from the error table, in the caller's dialect; a path
that is not listed here does not exist.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable
from typing import Final, get_args

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import Rule

from sagemaker_entry import log
from sagemaker_entry.dialects.choose import Dialect, DialectSetting, Route, error_dialect
from sagemaker_entry.dialects.listings import Listed, ServerFacts, info_body, model_body, models_body
from sagemaker_entry.dialects.presenter import JSON_TYPE, error_body
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ENVIRON_KEY, ClientLeft, Exchange
from sagemaker_entry.health import Health
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.replies import Replies
from sagemaker_entry.service import Service
from sagemaker_entry.settings import Settings

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
ATTRIBUTES: Final = "X-Amzn-SageMaker-Custom-Attributes"
PAYLOAD_MB: Final = 6  # what the platform forwards; larger bodies only reach us directly
TRANSFORM_BUDGET_MB: Final = 100  # MaxConcurrentTransforms x MaxPayloadInMB may not exceed it
OPEN_PATHS: Final = frozenset({"/ping", "/health"})  # answered without a key, like GET /

_ECHOED = re.compile(r"[A-Za-z0-9._=-]{1,1024}")
_ATTRIBUTES = re.compile(r"[ -~]{0,1024}")
_JSON_CONTENT = re.compile(r'application/json[ \t]*(?:;[ \t]*charset="?utf-8"?[ \t]*)?', re.IGNORECASE)
# Path -> the template it is counted and logged as, and parsed as.
_GENERATING: Final = {
    "/invocations": Route.INVOCATIONS,
    "/": Route.ROOT,
    "/generate": Route.GENERATE,
    "/generate_stream": Route.GENERATE_STREAM,
    "/v1/chat/completions": Route.CHAT,
    "/v1/completions": Route.COMPLETIONS,
    "/openai/v1/chat/completions": Route.CHAT,
    "/openai/v1/completions": Route.COMPLETIONS,
}


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
    ) -> None:
        self._settings = settings
        self._service = service
        self._health = health
        self._metrics = metrics
        self._facts = facts
        self._models = (Listed(settings.name, loaded_s),)
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()
        dialect = settings.dialect
        self._dialect: DialectSetting = dialect if dialect in get_args(DialectSetting) else "auto"  # type: ignore[assignment]
        self._replies = Replies(settings, service, metrics, self._dialect, facts.fingerprint)
        self.wsgi = self._build()

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
        for path, route in _GENERATING.items():
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
        attributes = request.headers.get(ATTRIBUTES)
        if attributes is not None and not _ATTRIBUTES.fullmatch(attributes):
            raise ApiError(Code.BAD_REQUEST)
        self._check_key()
        if request.environ["PATH_INFO"].startswith("//"):
            raise ApiError(Code.NOT_FOUND)  # the router would look past all slashes but one
        if exchange.draining() and exchange.route not in OPEN_PATHS:
            raise ApiError(Code.DRAINING, retry_after_s=1)

    def _check_key(self) -> None:
        if (
            self._key is None
            or request.path in OPEN_PATHS
            or (request.path == "/" and request.method == "GET")
        ):
            return
        given = request.headers.get("Authorization", "")
        scheme, _, key = given.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        if not hmac.compare_digest(digest, self._key) or scheme.lower() != "bearer":
            raise ApiError(Code.UNAUTHORIZED)

    def _after(self, response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        attributes = request.headers.get(ATTRIBUTES)
        if attributes is not None and _ECHOED.fullmatch(attributes):
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
        route = _GENERATING.get(request.path)
        if route is None and request.path in ("/tokenize", "/chat_tokenize"):
            route = Route(request.path)
        return error_dialect(route, self._dialect)

    # Views

    def _ping(self) -> Response:
        error = self._health.error()
        if error is None:
            healthy = Response(b"", 200)
            del healthy.headers["Content-Type"]
            return healthy
        body, _ = error_body(Dialect.OPENAI_CHAT, error, current().public_id)
        response = _json(json.dumps(json.loads(body) | self._health.phase()).encode())
        response.status_code = error.status
        response.headers["Retry-After"] = str(error.retry_after_s)
        current().error_code = error.code.value
        return response

    def _generating(self, route: Route) -> Callable[[], Response]:
        def view() -> Response:
            check_content()
            body = current().body.read()
            self._check_ready()
            return self._replies.generate(route, body, current())

        return view

    def _tokenize(self, route: Route) -> Response:
        check_content()
        body = current().body.read()
        self._check_ready()
        return self._replies.tokenize(route, body)

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
                    "BatchStrategy": "SINGLE_RECORD",
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
    if path in _GENERATING:
        return _GENERATING[path].value
    text = str(rule.rule).removeprefix("/openai")
    return "/v1/models" if text.startswith("/v1/models") else text


def check_content() -> None:
    """Refuse a body that does not say it is plain JSON; saying nothing counts as JSON."""
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise ApiError(Code.CONTENT_ENCODING)
    content_type = request.headers.get("Content-Type", JSON_TYPE)
    if not _JSON_CONTENT.fullmatch(content_type.strip()):
        raise ApiError(Code.MEDIA_TYPE)


def _json(body: bytes) -> Response:
    return Response(body, 200, content_type=JSON_TYPE)
