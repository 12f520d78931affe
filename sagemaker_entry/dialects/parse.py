"""The one way in: a decoded body of a known dialect to a generation request and its presenter.

Owns: the dispatch. Must not know: HTTP, what any field means.
Invariant: nothing but ApiError leaves `parse` for any value strict_json can return.

    value = strict_json.loads(body)
    dialect = choose(route, value, setting)
    parsed = parse(dialect, route, value, options)       errors: error_body(dialect, error, request_id)
"""

from __future__ import annotations

from typing import Any

from sagemaker_entry.dialects import cohere, openai_chat, openai_completion, tgi
from sagemaker_entry.dialects.choose import Dialect, Route
from sagemaker_entry.dialects.presenter import Parsed, ParseOptions


def parse(dialect: Dialect, route: Route, body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    match dialect:
        case Dialect.TGI:
            return tgi.parse(route, body, options)
        case Dialect.OPENAI_CHAT:
            return openai_chat.parse(body, options)
        case Dialect.OPENAI_COMPLETION:
            return openai_completion.parse(body, options)
        case Dialect.COHERE:
            return cohere.parse(body, options)
