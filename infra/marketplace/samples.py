"""The sample inputs and what a running server answered to them.

Owns: which calls are recorded and in which file each answer lies. Must not know: the listing, AWS.
Invariant: an answer is kept byte for byte as it came; a call that fails ends the recording.

The calls are those that the platform makes of a container: `/ping`, `/invocations` whole, streamed, and a
batch line by line.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from infra.marketplace import vendor
from infra.marketplace.request import JSON_TYPE
from infra.marketplace.rules import METERING_DIMENSION
from infra.report import CommandError, ExitCode

LINES_TYPE: Final = "application/jsonlines"
FOLDER: Final = "samples"
REALTIME_INPUT: Final = f"{FOLDER}/realtime_input.json"
REALTIME_OUTPUT: Final = f"{FOLDER}/realtime_output.json"
STREAM_INPUT: Final = f"{FOLDER}/stream_input.json"
STREAM_OUTPUT: Final = f"{FOLDER}/stream_output.txt"
BATCH_INPUT: Final = f"{FOLDER}/batch_input.jsonl"
BATCH_OUTPUT: Final = f"{FOLDER}/batch_output.jsonl"
FILES: Final = (REALTIME_INPUT, REALTIME_OUTPUT, STREAM_INPUT, STREAM_OUTPUT, BATCH_INPUT, BATCH_OUTPUT)
CALL_S: Final = 120.0
ANSWER_BYTES: Final = 4 * 1024 * 1024
METERING: Final = "X-Amzn-Inference-Metering"
LOCKDOWN: Final = "Strongroom-Lockdown"


class Recording(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was recorded: the files' digests, and what the server's headers showed."""

    sha256: dict[str, str]
    batch_type: str
    metered: bool
    locked: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def record(server: str, asked: vendor.Samples) -> tuple[Recording, dict[str, bytes]]:
    """Return what the server at `HOST:PORT` answered, and the files; raises CommandError."""
    host, port = _address(server)
    ping = _call(host, port, "GET", "/ping", b"", JSON_TYPE)
    if ping.status != 200:
        raise _failed("`/ping` does not say 200", "wait until the server has loaded its model")
    first = _chat(asked.prompts[0], asked.max_tokens)
    streamed = _chat(asked.prompts[0], asked.max_tokens, stream=True)
    lines = [_chat(prompt, asked.max_tokens) for prompt in asked.prompts]
    whole = _good(host, port, first, JSON_TYPE)
    answers, batch_type = _batch(host, port, lines)
    files = {
        REALTIME_INPUT: first,
        REALTIME_OUTPUT: whole.body,
        STREAM_INPUT: streamed,
        STREAM_OUTPUT: _good(host, port, streamed, JSON_TYPE).body,
        BATCH_INPUT: b"".join(line + b"\n" for line in lines),
        BATCH_OUTPUT: b"".join(answer.strip() + b"\n" for answer in answers),
    }
    recording = Recording(
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        batch_type,
        _metered(whole.headers),
        ping.headers.get(LOCKDOWN) == "on",
    )
    return recording, files


def faults(recording: Recording, files: Mapping[str, bytes]) -> list[str]:
    """Return what is wrong with the sample files of a folder."""
    found = [f"`{name}` is missing" for name in FILES if name not in files]
    for name in FILES:
        if name in files and hashlib.sha256(files[name]).hexdigest() != recording.sha256.get(name):
            found.append(f"`{name}` is not what was recorded")
    if found:
        return found
    for name in (REALTIME_INPUT, REALTIME_OUTPUT, STREAM_INPUT):
        if not _is_json(files[name]):
            found.append(f"`{name}` is no JSON document")
    for name in (BATCH_INPUT, BATCH_OUTPUT):
        lines = files[name].splitlines()
        found += [
            f"`{name}` line {at} is no JSON document"
            for at, line in enumerate(lines, 1)
            if not _is_json(line)
        ]
    if len(files[BATCH_INPUT].splitlines()) != len(files[BATCH_OUTPUT].splitlines()):
        found.append(f"`{BATCH_OUTPUT}` has not one line for each line of `{BATCH_INPUT}`")
    if not files[STREAM_OUTPUT].rstrip().endswith(b"data: [DONE]"):
        found.append(f"`{STREAM_OUTPUT}` does not end as a stream does")
    return found


def _batch(host: str, port: int, lines: list[bytes]) -> tuple[list[bytes], str]:
    """Return an answer a line, and the content type the server takes for them."""
    for kind in (LINES_TYPE, JSON_TYPE):
        answers = [_call(host, port, "POST", "/invocations", line, kind) for line in lines[:1]]
        if answers[0].status != 200:
            continue  # the server does not know the type; a whole document it always does
        answers += [_good(host, port, line, kind) for line in lines[1:]]
        return [answer.body for answer in answers], kind
    raise _failed("it answers no line of the batch", "call it with `strongroom invoke` and look at its log")


def _chat(prompt: str, max_tokens: int, *, stream: bool = False) -> bytes:
    document: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    if stream:
        document |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(document, ensure_ascii=False).encode()


def _good(host: str, port: int, body: bytes, kind: str) -> _Answer:
    answer = _call(host, port, "POST", "/invocations", body, kind)
    if answer.status != 200:
        raise _failed(f"`/invocations` says {answer.status}", "see the server's log")
    return answer


def _call(host: str, port: int, method: str, path: str, body: bytes, kind: str) -> _Answer:
    connection = http.client.HTTPConnection(host, port, timeout=CALL_S)
    headers = {"Content-Type": kind, "Accept": kind}
    try:
        connection.request(method, path, body=body or None, headers=headers)
        with contextlib.closing(connection.getresponse()) as reply:
            data = reply.read(ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise _failed("it does not answer", "start `strongroom serve` and give its address") from error
    finally:
        connection.close()
    if len(data) > ANSWER_BYTES:
        raise _failed(f"an answer has more than {ANSWER_BYTES} bytes", "lower `samples.max_tokens`")
    return _Answer(reply.status, dict(reply.getheaders()), data)


def _metered(headers: Mapping[str, str]) -> bool:
    text = headers.get(METERING, "")
    try:
        told = json.loads(text) if text else {}
    except ValueError:
        return False
    units = told.get("ConsumedUnits") if isinstance(told, dict) else None
    return isinstance(units, int) and units > 0 and told.get("Dimension") == METERING_DIMENSION


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise CommandError(ExitCode.USAGE, "bad_argument", f"`{server}` is not HOST:PORT")
    return host, int(port)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _failed(why: str, hint: str) -> CommandError:
    return CommandError(
        ExitCode.ENVIRONMENT_MISSING, "not_recorded", f"the server was not recorded: {why}", hint
    )
