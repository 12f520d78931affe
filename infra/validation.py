"""Whether AWS would accept a request: its own service model, with the limits that the SDK does not check.

Owns: the walk over a shape, the rules no shape states. Must not know: who sends the request.
Invariant: all faults are collected, in AWS's wording; every pattern of the services in use can be read.

The SDK checks names, types and minima; it lets wrong enum values, maxima and patterns through to the service.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Final

from botocore.model import Shape
from botocore.session import Session
from botocore.validate import ParamValidator

from infra.templates.instances import ENDPOINT

# Java's ASCII classes, as the inside of a Python class.
_ASCII: Final = {"ASCII": r"\x00-\x7f", "Alnum": "A-Za-z0-9", "Print": r"\x20-\x7e"}
# What else Java reads and Python does not, and two patterns whose last sign was meant as a length (which the
# shape states as well).
_SPELLING: Final = (
    (r"\uD800\uDC00-\uDBFF\uDFFF", "\U00010000-\U0010ffff"),
    (r"[\w-_]", r"[\w\-_]"),
    (r"\z", r"\Z"),
    (")${1,128}", ")"),
    (")${1,256}", ")"),
)
Rule = Callable[[dict[str, Any]], Iterator[str]]
ENVIRONMENT_ENTRIES: Final = 16
BATCH_MB: Final = 100


@functools.cache
def _model(service: str) -> Any:
    return Session().get_service_model(service)


def faults(service: str, operation: str, request: dict[str, Any]) -> list[str]:
    """Return what AWS would refuse in `request`, as sentences; `operation` as in `CreateEndpoint`."""
    shape = _model(service).operation_model(operation).input_shape
    if shape is None:
        return []
    report = ParamValidator().validate(request, shape)
    found: list[str] = report.generate_report().splitlines() if report.has_errors() else []
    found += _walk(shape, request, "")
    for rule in RULES.get(operation, ()):
        found += rule(request)
    return found


def _walk(shape: Shape, value: Any, path: str) -> Iterator[str]:
    """Yield the constraints that `value` breaks; wrong types are the SDK's own business."""
    kind = shape.type_name
    if kind == "structure" and isinstance(value, dict):
        for name, held in value.items():
            if name in shape.members:
                yield from _walk(shape.members[name], held, f"{path}.{_lower(name)}".lstrip("."))
    elif kind == "list" and isinstance(value, list | tuple):
        yield from _size(shape, len(value), path, "length")
        for index, held in enumerate(value, 1):
            yield from _walk(shape.member, held, f"{path}.{index}.member")
    elif kind == "map" and isinstance(value, dict):
        yield from _size(shape, len(value), path, "length")
        for name, held in value.items():
            yield from _walk(shape.key, name, f"{path}.key")
            yield from _walk(shape.value, held, f"{path}.{name}.member")
    elif kind == "string" and isinstance(value, str):
        yield from _text(shape, value, path)
    elif kind in ("integer", "long", "float", "double") and isinstance(value, int | float):
        yield from _size(shape, value, path, "value")


def _text(shape: Shape, value: str, path: str) -> Iterator[str]:
    yield from _size(shape, len(value), path, "length")
    if shape.enum and value not in shape.enum:
        choices = ", ".join(shape.enum)
        yield _sentence(value, path, f"Member must satisfy enum value set: [{choices}]")
    pattern = shape.metadata.get("pattern")
    if pattern and readable(pattern).fullmatch(value) is None:
        yield _sentence(value, path, f"Member must satisfy regular expression pattern: {pattern}")


def _size(shape: Shape, size: float, path: str, what: str) -> Iterator[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if low is not None and size < low:
        yield _sentence(size, path, f"Member must have {what} greater than or equal to {low}")
    if high is not None and size > high:
        yield _sentence(size, path, f"Member must have {what} less than or equal to {high}")


def _sentence(value: object, path: str, constraint: str) -> str:
    return f"Value '{value}' at '{path}' failed to satisfy constraint: {constraint}"


def _lower(name: str) -> str:
    return name[0].lower() + name[1:]


@functools.cache
def readable(pattern: str) -> re.Pattern[str]:
    """Return a pattern of the model, which is Java's, as Python's; raises re.error where it cannot."""
    for java, python in _SPELLING:
        pattern = pattern.replace(java, python)
    inside, made, at = False, "", 0
    while at < len(pattern):
        named = re.compile(r"\\p\{(\w+)\}").match(pattern, at)
        if named:
            held = _ASCII.get(named[1]) or _category(named[1])
            made += held if inside else f"[{held}]"
            at = named.end()
            continue
        sign = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        inside = sign == "[" or (inside and sign != "]")
        made += sign
        at += len(sign)
    return re.compile(made)


@functools.cache
def _category(name: str) -> str:
    """Return the characters of a Unicode category (`L`, `Zs`) as the inside of a class."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if not unicodedata.category(chr(code)).startswith(name):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


def _environment(where: str, entries: Any) -> Iterator[str]:
    if isinstance(entries, dict) and len(entries) > ENVIRONMENT_ENTRIES:
        yield f"`{where}` has {len(entries)} entries; AWS documents at most {ENVIRONMENT_ENTRIES}"


def _transform(request: dict[str, Any]) -> Iterator[str]:
    """Yield what no shape says of a batch transform job."""
    yield from _environment("Environment", request.get("Environment"))
    resources = request.get("TransformResources", {})
    kind = ENDPOINT.get(str(resources.get("InstanceType")))
    if "VolumeKmsKeyId" in resources and (kind is None or kind.local_disk):
        yield "`VolumeKmsKeyId` is refused for instance types with local disks"
    if kind is not None and not kind.batch:
        yield f"`{resources['InstanceType']}` is not offered for batch transform"
    payload_mb, calls = request.get("MaxPayloadInMB", 6), request.get("MaxConcurrentTransforms", 1)
    if payload_mb * calls > BATCH_MB:
        yield f"`MaxPayloadInMB` times `MaxConcurrentTransforms` is {payload_mb * calls}, above {BATCH_MB}"


def _created_model(request: dict[str, Any]) -> Iterator[str]:
    """Yield what no shape says of a model."""
    container = request.get("PrimaryContainer", {})
    source = container.get("ModelDataSource", {}).get("S3DataSource", {})
    uri = str(source.get("S3Uri", ""))
    if source.get("S3DataType") == "S3Prefix" and not uri.endswith("/"):
        yield "`S3Uri` of an S3Prefix must end in `/`"
    if container.get("Image", "@sha256:").count("@sha256:") != 1:
        yield "`Image` must be given by digest: a tag can be moved after it was checked"
    if request.get("EnableNetworkIsolation") is not True:
        yield "`EnableNetworkIsolation` must be true"


def _endpoint_config(request: dict[str, Any]) -> Iterator[str]:
    """Yield what no shape says of an endpoint's configuration, and what would let content out."""
    if "DataCaptureConfig" in request:
        yield "`DataCaptureConfig` copies prompts and answers; it is never set"
    for variant in request.get("ProductionVariants", []):
        for name in ("CoreDumpConfig", "EnableSSMAccess"):
            if name in variant:
                yield f"`{name}` opens prompts and weights; it is never set"
        if ("InstanceType" in variant) == ("InstancePools" in variant):
            yield "exactly one of `InstanceType` and `InstancePools` must be set"


def _package(request: dict[str, Any]) -> Iterator[str]:
    """Yield what no shape says of a model package."""
    for container in request.get("InferenceSpecification", {}).get("Containers", []):
        yield from _environment("Containers.Environment", container.get("Environment"))


RULES: Final[dict[str, tuple[Rule, ...]]] = {
    "CreateEndpointConfig": (_endpoint_config,),
    "CreateModel": (_created_model,),
    "CreateModelPackage": (_package,),
    "CreateTransformJob": (_transform,),
}
