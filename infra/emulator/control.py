"""The control plane's batch operations, as an SDK calls them: JSON 1.1 on `/`.

Owns: the operations, their checks and errors. Must not know: how a job runs.
Invariant: a request that AWS's own service model refuses starts nothing, and is answered with the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from infra.emulator.errors import ACCOUNT, ServiceError
from infra.emulator.registry import Registry
from infra.emulator.transform import BadJob, Job, Transforms, arn, describe

TARGET: Final = "X-Amz-Target"
PREFIX: Final = "SageMaker."
CONTENT_TYPE: Final = "application/x-amz-json-1.1"
BODY_BYTES: Final = 256 * 1024


class Control:
    """Answers control-plane requests; a model of a job is named like the endpoint it is served by."""

    def __init__(self, registry: Registry, transforms: Transforms, region: str) -> None:
        self._registry = registry
        self._transforms = transforms
        self._region = region
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "CreateTransformJob": self._create,
            "DescribeTransformJob": self._describe,
            "StopTransformJob": self._stop,
        }

    def answer(self, target: str, body: bytes) -> bytes:
        """Return the reply to operation `target`; raises ServiceError."""
        name = target.removeprefix(PREFIX)
        operation = self._operations.get(name)
        if operation is None or target == name:
            raise _error("UnknownOperationException", "the emulator has no such operation")
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            raise _error("SerializationException", "the body is not a JSON object")
        return json.dumps(operation(request)).encode()

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        from infra.validation import faults

        found = faults("sagemaker", "CreateTransformJob", request)
        if found:
            noun = "error" if len(found) == 1 else "errors"
            raise _error(
                "ValidationException", f"{len(found)} validation {noun} detected: {'; '.join(found)}"
            )
        endpoint = self._registry.find(request["ModelName"])
        if endpoint is None:
            raise _error("ValidationException", f'Could not find model "{request["ModelName"]}".')
        try:
            self._transforms.start(request, endpoint.upstream)
        except BadJob as error:
            raise _error("ValidationException", str(error)) from error
        return {"TransformJobArn": arn(request["TransformJobName"], self._region, ACCOUNT)}

    def _describe(self, request: dict[str, Any]) -> dict[str, Any]:
        return describe(self._job(request), self._region, ACCOUNT)

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        job = self._job(request)
        if job.status != "InProgress":
            raise _error("ValidationException", f"The job is {job.status} and cannot be stopped.")
        self._transforms.stop(job)
        return {}

    def _job(self, request: dict[str, Any]) -> Job:
        job = self._transforms.find(str(request.get("TransformJobName")))
        if job is None:
            raise _error("ResourceNotFound", "Could not find the requested transform job.")
        return job


def _error(kind: str, message: str) -> ServiceError:
    return ServiceError(400, kind, message, __type=kind)
