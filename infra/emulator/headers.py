"""Which headers pass between caller and container, and what their values may be.

Owns: the forwarding tables. Must not know: sockets, routes' bodies.
Invariant: a header that is not in a table does not pass; a value that passes is printable ASCII within its
limit.

Source: members of InvokeEndpoint and InvokeEndpointWithResponseStream in the service model (botocore 1.44.5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from email.message import Message
from typing import Final, NamedTuple

from infra.emulator.errors import validation_error
from infra.emulator.http1 import Head

PREFIX: Final = "X-Amzn-SageMaker-"
CUSTOM_ATTRIBUTES: Final = f"{PREFIX}Custom-Attributes"
COMPONENT: Final = f"{PREFIX}Inference-Component"
SESSION: Final = f"{PREFIX}Session-Id"
TARGET_MODEL: Final = f"{PREFIX}Target-Model"
TARGET_VARIANT: Final = f"{PREFIX}Target-Variant"
FORWARDED_API: Final = f"{PREFIX}Forwarded-Api"  # undocumented: tells a container which operation was called
STREAM_ACCEPT: Final = f"{PREFIX}Accept"
STREAM_CONTENT_TYPE: Final = f"{PREFIX}Content-Type"
INVOKED_VARIANT: Final = "x-Amzn-Invoked-Production-Variant"


class Rule(NamedTuple):
    """A header that passes: its member name in the API, longest value, and pattern."""

    member: str
    characters: int
    pattern: str = r"[\x20-\x7e\t]*"


_NAME: Final = r"[a-zA-Z0-9](-*[a-zA-Z0-9])*"
_PRINTABLE: Final = r"[\x21-\x7e][\x20-\x7e]*"

REQUEST: Final[dict[str, Rule]] = {
    "Content-Type": Rule("contentType", 1024),
    "Accept": Rule("accept", 1024),
    CUSTOM_ATTRIBUTES: Rule("customAttributes", 1024),
    f"{PREFIX}Inference-Id": Rule("inferenceId", 64, _PRINTABLE),
    SESSION: Rule("sessionId", 256, f"(NEW_SESSION|{_NAME})"),
    TARGET_MODEL: Rule("targetModel", 1024, _PRINTABLE),
    TARGET_VARIANT: Rule("targetVariant", 63, _NAME),
    f"{PREFIX}Target-Container-Hostname": Rule("targetContainerHostname", 63, _NAME),
    COMPONENT: Rule("inferenceComponentName", 63, _NAME),
    f"{PREFIX}Enable-Explanations": Rule("enableExplanations", 64),
    f"{PREFIX}Prefix-Aware-Id": Rule("prefixAwareId", 64, _PRINTABLE),
}

# Of InvokeEndpointAsync: its own, and the ones that become the container's under another name.
INPUT_LOCATION: Final = f"{PREFIX}InputLocation"
EXTENSION: Final = f"{PREFIX}S3OutputPathExtension"
FILENAME: Final = f"{PREFIX}Filename"
TTL: Final = f"{PREFIX}RequestTTLSeconds"
TIMEOUT: Final = f"{PREFIX}InvocationTimeoutSeconds"
INFERENCE_ID: Final = f"{PREFIX}Inference-Id"
ASYNC: Final[dict[str, Rule]] = {
    INPUT_LOCATION: Rule("inputLocation", 1024, r"(https|s3)://([^/]+)/?(.*)"),
    EXTENSION: Rule("s3OutputPathExtension", 512, r"(?!s3:|https:)[a-zA-Z0-9!_.*'()/-]+"),
    FILENAME: Rule("filename", 32, r"(?!.*\..*\.)[a-zA-Z0-9][a-zA-Z0-9-_.]*"),
    TTL: Rule("requestTTLSeconds", 5, r"[0-9]+"),
    TIMEOUT: Rule("invocationTimeoutSeconds", 4, r"[0-9]+"),
}
ASYNC_PASSED: Final = {
    STREAM_CONTENT_TYPE: "Content-Type",
    STREAM_ACCEPT: "Accept",
    CUSTOM_ATTRIBUTES: CUSTOM_ATTRIBUTES,
    INFERENCE_ID: INFERENCE_ID,
}

RESPONSE: Final = (
    CUSTOM_ATTRIBUTES,
    f"{PREFIX}New-Session-Id",
    f"{PREFIX}Closed-Session-Id",
)

# Belong to one connection (RFC 9110, 7.6.1) or are written anew.
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

_NAME_CHARACTERS: Final = re.compile("[A-Za-z0-9-]{1,64}")

Pairs = list[tuple[str, str]]


def _rule(name: str, *, stream: bool) -> Rule:
    """Return the rule of a header; a session cannot be opened over the stream operation."""
    return Rule("sessionId", 256, _NAME) if stream and name == SESSION else REQUEST[name]


def forwarded(headers: Message, *, stream: bool) -> Pairs:
    """Return what the container gets of the caller's headers.

    In the stream call the caller's Accept travels under its own name. Raises ServiceError (ValidationError)
    naming the member when a value breaks the service model.
    """
    passed: Pairs = []
    for name in REQUEST:
        value = headers.get(STREAM_ACCEPT if stream and name == "Accept" else name)
        if value is None:
            continue
        check(value, _rule(name, stream=stream))
        passed.append((name, value))
    return passed


def asynchronous(headers: Message) -> tuple[Pairs, dict[str, str]]:
    """Return what the container gets of an asynchronous call's headers, and those for the platform.

    Raises ServiceError (ValidationError) as `forwarded` does.
    """
    passed: Pairs = []
    for name, inner in ASYNC_PASSED.items():
        value = headers.get(name)
        if value is not None:
            check(value, REQUEST[inner])
            passed.append((inner, value))
    own = {}
    for name, rule in ASYNC.items():
        value = headers.get(name)
        if value is not None:
            check(value, rule)
            own[name] = value
    return passed, own


def check(value: str, rule: Rule) -> None:
    """Raise ServiceError (ValidationError) when `value` breaks `rule`; the message never holds the value."""
    if len(value) > rule.characters:
        limit = f"have length less than or equal to {rule.characters}"
    elif re.fullmatch(rule.pattern, value) is None:
        limit = "satisfy its regular expression pattern"
    else:
        return
    where = f"Value at '{rule.member}' failed to satisfy constraint"
    raise validation_error(f"1 validation error detected: {where}: Member must {limit}")


def returned(head: Head, variant: str, *, stream: bool) -> Pairs:
    """Return what the caller gets of the container's headers, besides the framing."""
    passed: Pairs = [(INVOKED_VARIANT, variant)]
    content_type = head.get("Content-Type")
    if content_type is not None:
        passed.append((STREAM_CONTENT_TYPE if stream else "Content-Type", content_type))
    for name in RESPONSE:
        value = head.get(name)
        if value is not None:
            passed.append((name, value))
    return passed


def unchanged(headers: Iterable[tuple[str, str]]) -> Pairs:
    """Return `headers` without those that belong to one connection only."""
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]


def names(headers: Message) -> list[str]:
    """Return the caller's header names, sorted; odd ones, which could carry text, become `(other)`."""
    listed: Sequence[str] = headers.keys()
    return sorted({name if _NAME_CHARACTERS.fullmatch(name) else "(other)" for name in listed})
