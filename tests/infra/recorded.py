"""A session with real clients and recorded answers: requests are built and checked, none is sent.

Owns: the hook that answers. Must not know: what is deployed.
Invariant: an answer has the form that the service model gives it; an operation without an answer fails the
test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import boto3
from botocore.validate import ParamValidator

Answer = dict[str, Any]
Answers = dict[str, "Answer | list[Answer] | Callable[[Answer], Answer]"]


class _Http:
    def __init__(self) -> None:
        self.status_code = 200
        self.headers: dict[str, str] = {}


def refusal(code: str, message: str = "") -> Answer:
    """Return an answer that the client raises as a ClientError."""
    return {"Error": {"Code": code, "Message": message or code}, "ResponseMetadata": {"HTTPStatusCode": 400}}


class Recorded:
    """Stands where a boto3 session would; `calls` holds what was asked, in order."""

    def __init__(self, answers: Answers, region: str = "us-east-1") -> None:
        self.region_name = region
        self.answers = answers
        self.calls: list[tuple[str, Answer]] = []
        self._session = boto3.Session(
            aws_access_key_id="AKIDEXAMPLE", aws_secret_access_key="secret", region_name=region
        )

    def client(self, service: str, **options: Any) -> Any:
        made = self._session.client(service, **options)
        made.meta.events.register("provide-client-params", self._note)
        made.meta.events.register("before-call", self._answer)
        return made

    def named(self, operation: str) -> list[Answer]:
        return [request for name, request in self.calls if name == operation]

    def _note(self, params: Answer, model: Any, **_: Any) -> None:
        self.calls.append((model.name, params))

    def _answer(self, model: Any, **_: Any) -> tuple[_Http, Answer]:
        given = self.answers[model.name]
        request = self.named(model.name)[-1]
        if isinstance(given, list):
            given = given.pop(0) if len(given) > 1 else given[0]
        answer = given(request) if callable(given) else given
        http = _Http()
        if "Error" in answer:
            http.status_code = 400
        elif model.output_shape is not None:
            report = ParamValidator().validate(answer, model.output_shape)
            assert not report.has_errors(), report.generate_report()
        return http, {"ResponseMetadata": {"HTTPStatusCode": http.status_code}, **answer}
