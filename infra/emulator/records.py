"""Batch transform's records: how an input is cut into payloads and how answers become an output.

Owns: splitting, strategies, size limits, filters, joining, assembling. Must not know: jobs, stores, sockets.
Invariant: without filters the payloads of a split input hold every record once, in order; what cannot be done
as the platform does it raises BadRecords.

A filter is the part of JSONPath that the platform documents: `$`, `$.name`, `$['name']`, `$[3]`, `$[1:3]`,
and chains of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

MB: Final = 1024 * 1024
_STEP: Final = re.compile(
    r"\.([A-Za-z_][\w-]*)|\['([^'\]]+)'\]|\[(-?\d{1,9})\]|\[(-?\d{1,9})?:(-?\d{1,9})?\]"
)


class BadRecords(Exception):
    """An input, an answer or a filter that the platform would fail the file for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a job reads and writes; the words are the API's."""

    split: str = "None"
    strategy: str = "MultiRecord"
    payload_bytes: int = 6 * MB  # 0: the whole input, however large
    assemble: str = "None"
    input_filter: str = "$"
    output_filter: str = "$"
    join: str = "None"

    @property
    def processes(self) -> bool:
        """True when records are looked into."""
        return (self.input_filter, self.output_filter, self.join) != ("$", "$", "None")


def check_shape(shape: Shape) -> None:
    """Raise BadRecords for a combination the platform refuses, or a filter it does not read."""
    for path in (shape.input_filter, shape.output_filter):
        steps(path)
    if shape.split not in ("None", "Line"):
        raise BadRecords(f"SplitType {shape.split} is not emulated")
    if shape.join == "Input" and (shape.split == "None") != (shape.assemble == "None"):
        raise BadRecords("JoinSource needs the same SplitType and AssembleWith")


def payloads(data: bytes, shape: Shape) -> Iterator[list[bytes]]:
    """Yield the records of each request, filtered; raises BadRecords."""
    held: list[bytes] = []
    held_bytes = 0
    for record in _records(data, shape):
        sent = filtered(record, shape.input_filter)
        size = len(sent) + 1
        if shape.payload_bytes and len(sent) > shape.payload_bytes:
            raise BadRecords(f"a record of {len(sent)} bytes is larger than MaxPayloadInMB")
        alone = shape.strategy == "SingleRecord" or shape.split == "None"
        if held and (alone or (shape.payload_bytes and held_bytes + size > shape.payload_bytes)):
            yield held
            held, held_bytes = [], 0
        held.append(record)
        held_bytes += size
    if held:
        yield held


def request_body(records: Sequence[bytes], shape: Shape) -> bytes:
    """Return what is sent for `records`."""
    sent = [filtered(record, shape.input_filter) for record in records]
    return sent[0] if shape.split == "None" else b"".join(record + b"\n" for record in sent)


def output(records: Sequence[bytes], answer: bytes, shape: Shape) -> bytes:
    """Return what the output gets for `records` and the container's `answer`; raises BadRecords."""
    if not shape.processes:
        if shape.assemble == "None":
            return answer
        return answer.removesuffix(b"\n") + b"\n"
    answers = [answer] if shape.split == "None" else answer.removesuffix(b"\n").split(b"\n")
    if len(answers) != len(records):
        raise BadRecords(f"{len(records)} records have {len(answers)} answers; they cannot be joined")
    lines = [_joined(record, line, shape) for record, line in zip(records, answers, strict=True)]
    return b"".join(line + b"\n" for line in lines) if shape.assemble == "Line" else b"".join(lines)


def filtered(record: bytes, path: str) -> bytes:
    """Return what `path` selects of a JSON record, which stays as it is for `$`."""
    return record if path == "$" else _dump(select(_load(record), path))


def select(value: Any, path: str) -> Any:
    """Return what `path` selects of `value`; raises BadRecords where it selects nothing."""
    for name, index, cut in steps(path):
        try:
            if name is not None:
                value = value[name]
            else:
                value = value[index] if cut is None else value[cut]
        except (KeyError, IndexError, TypeError):
            raise BadRecords("a filter selects nothing in a record") from None
    return value


def steps(path: str) -> list[tuple[str | None, int, slice | None]]:
    """Return a filter as (name, index, slice) steps; raises BadRecords for what is not read."""
    if not path.startswith("$"):
        raise BadRecords("a filter begins with `$`")
    made: list[tuple[str | None, int, slice | None]] = []
    at = 1
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None:
            raise BadRecords("a filter is made of names, indices and slices")
        name = match[1] or match[2]
        if name is not None or match[3] is not None:
            made.append((name, int(match[3] or 0), None))
        else:
            low, high = (None if text is None else int(text) for text in (match[4], match[5]))
            made.append((None, 0, slice(low, high)))
        at = match.end()
    return made


def _records(data: bytes, shape: Shape) -> Iterator[bytes]:
    if shape.split == "None":
        yield data
        return
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        record = data[start:end].removesuffix(b"\r")
        if record:
            yield record
        start = end + 1


def _joined(record: bytes, answer: bytes, shape: Shape) -> bytes:
    if shape.join == "None":
        return filtered(answer, shape.output_filter)
    given, said = _load(record), _load(answer)
    if isinstance(given, dict):
        whole = {**given, "SageMakerOutput": said}
    else:
        whole = {"SageMakerInput": given, "SageMakerOutput": said}
    return _dump(select(whole, shape.output_filter))


def _load(record: bytes) -> Any:
    try:
        return json.loads(record)
    except ValueError:
        raise BadRecords("a record to be filtered or joined is not JSON") from None


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
