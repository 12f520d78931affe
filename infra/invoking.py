"""`strongroom invoke`: one call of an endpoint, whole or streamed, through boto3.

Owns: the request body of `--prompt`, reading an answer's text from the shapes it may have. Must not know: who
answers, an emulator or AWS.
Invariant: parts of a stream are joined and split into lines again before anything is read from them; a part
may end anywhere, inside a character too.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from infra.bearer import missing_sdk, no_credentials
from infra.emulator import LOCAL_KEYS, LOCAL_REGION, Emulator
from infra.emulator.registry import UNIX
from infra.report import CommandError, ExitCode, Result

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
READ_S = 70.0  # above the platform's 60 s, so that its own error arrives


def chat_body(prompt: str, max_tokens: int | None, stream: bool) -> bytes:
    """Return the chat request that asks `prompt`."""
    document: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "stream": stream}
    if max_tokens is not None:
        document["max_tokens"] = max_tokens
    return json.dumps(document).encode()


def call(
    endpoint_url: str | None,
    region: str | None,
    endpoint: str,
    body: bytes,
    stream: bool,
    show: Callable[[str], None],
    component: str | None = None,
) -> Result:
    """Return the answer's text and times; `show` gets the text as it arrives. Raises CommandError.

    A `unix:/PATH` is a server's own socket: an emulator of its own stands in between for the one call.
    """
    if endpoint_url is not None and endpoint_url.startswith(UNIX):
        try:
            between = Emulator(endpoint_url, endpoint)
        except ValueError as error:
            raise CommandError(ExitCode.USAGE, "bad_argument", str(error)) from error
        with between:
            return call(between.url, region, endpoint, body, stream, show)
    try:
        import botocore.exceptions as refusals
    except ModuleNotFoundError as error:
        raise missing_sdk() from error
    try:
        with contextlib.closing(_client(endpoint_url, region)) as client:
            target = {"EndpointName": endpoint}
            if component is not None:
                target["InferenceComponentName"] = component
            return (_streamed if stream else _whole)(client, target, body, show)
    except (refusals.ClientError, refusals.EventStreamError) as error:
        raise _refused(error.response) from error
    except (refusals.NoCredentialsError, refusals.PartialCredentialsError) as error:
        raise no_credentials() from error
    except refusals.NoRegionError as error:
        raise CommandError(
            ExitCode.ENVIRONMENT_MISSING, "no_region", "no region is set", "pass --region"
        ) from error
    except (refusals.ConnectionError, refusals.HTTPClientError, refusals.ResponseStreamingError) as error:
        raise CommandError(
            ExitCode.ENVIRONMENT_MISSING,
            "unreachable",
            "the endpoint URL does not answer",
            "start `strongroom emulate`, or check --endpoint-url",
        ) from error
    except refusals.BotoCoreError as error:
        raise CommandError(
            ExitCode.USAGE, "bad_argument", "the SDK refused the call", "check --endpoint and --endpoint-url"
        ) from error


def text_of(document: Any) -> str:
    """Return the text in one JSON document of an answer (OpenAI or TGI, whole or event), else nothing."""
    first = document[0] if isinstance(document, list) and document else document
    if not isinstance(first, dict):
        return ""
    for choice in first.get("choices") or [{}]:
        held = choice.get("message") or choice.get("delta") or choice
        if isinstance(text := held.get("content", held.get("text")), str):
            return text
    token = first.get("token")
    if isinstance(token, dict):
        return "" if token.get("special") else str(token.get("text", ""))
    return str(first.get("generated_text") or "")


def documents(parts: Iterable[bytes]) -> Iterator[Any]:
    """Yield the JSON documents of a server-sent event stream that arrives in `parts`."""
    buffer = b""
    for part in parts:
        buffer += part
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            name, _, value = line.strip().partition(b":")
            if name == b"data" and value.strip() != b"[DONE]":
                with contextlib.suppress(ValueError):  # not JSON: not ours to read
                    yield json.loads(value)


def _client(endpoint_url: str | None, region: str | None) -> Any:
    import boto3
    from botocore.config import Config

    arguments: dict[str, Any] = {"endpoint_url": endpoint_url, "region_name": region}
    if endpoint_url and urlsplit(endpoint_url).hostname in LOOPBACK:
        # An emulator: signatures made with real keys have no business there.
        arguments["aws_access_key_id"] = LOCAL_KEYS.access_key_id
        arguments["aws_secret_access_key"] = LOCAL_KEYS.secret_access_key
        arguments["region_name"] = region or LOCAL_REGION
    config = Config(read_timeout=READ_S, retries={"total_max_attempts": 1})
    return boto3.client("sagemaker-runtime", config=config, **arguments)


def _whole(client: Any, target: dict[str, str], body: bytes, show: Callable[[str], None]) -> Result:
    start_s = time.monotonic()
    answer = client.invoke_endpoint(**target, Body=body, ContentType="application/json")
    with contextlib.closing(answer["Body"]) as content:
        data = content.read()
    total_s = time.monotonic() - start_s
    try:
        text = text_of(json.loads(data))
    except ValueError:
        text = ""
    show(text or data.decode("utf-8", "replace"))
    return {
        "text": text,
        "body": data.decode("utf-8", "replace"),
        "content_type": answer.get("ContentType"),
        "variant": answer.get("InvokedProductionVariant"),
        "total_s": round(total_s, 4),
    }


def _streamed(client: Any, target: dict[str, str], body: bytes, show: Callable[[str], None]) -> Result:
    start_s = time.monotonic()
    times_s: list[float] = []
    size_bytes = 0
    answer = client.invoke_endpoint_with_response_stream(**target, Body=body, ContentType="application/json")

    def parts(events: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        nonlocal size_bytes
        for event in events:
            part: bytes = event["PayloadPart"]["Bytes"]
            times_s.append(time.monotonic() - start_s)
            size_bytes += len(part)
            yield part

    texts: list[str] = []
    with contextlib.closing(answer["Body"]) as events:
        for document in documents(parts(events)):
            texts.append(text_of(document))
            show(texts[-1])
    return {
        "text": "".join(texts),
        "content_type": answer.get("ContentType"),
        "variant": answer.get("InvokedProductionVariant"),
        "parts": len(times_s),
        "body_bytes": size_bytes,
        "first_part_s": round(times_s[0], 4) if times_s else None,
        "last_part_s": round(times_s[-1], 4) if times_s else None,
        "total_s": round(time.monotonic() - start_s, 4),
    }


def _refused(response: dict[str, Any]) -> CommandError:
    error = response.get("Error", {})
    status = response.get("OriginalStatusCode")
    hint = (
        "" if status is None else f"the container answered {status}" if status else "see the container's log"
    )
    return CommandError(
        ExitCode.AWS_REFUSED, str(error.get("Code", "unknown")), str(error.get("Message", "")), hint
    )
