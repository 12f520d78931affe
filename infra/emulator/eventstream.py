"""The `application/vnd.amazon.eventstream` encoding, as far as a response stream needs it.

Owns: the byte layout of one message. Must not know: HTTP, sockets, what the payload says.
Invariant: every message decodes in an AWS SDK: both checksums hold and no payload exceeds PART_BYTES.

    0       total length, u32, big endian, every field included
    4       length of the header block, u32
    8       CRC-32 of bytes 0..7
    12      headers: u8 name length | name | u8 type (7: string) | u16 value length | value
    12+n    payload
    end-4   CRC-32 of all bytes before it
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Final

CONTENT_TYPE: Final = "application/vnd.amazon.eventstream"

# SDKs refuse payloads above 24 MiB; small parts keep a reader's memory small and its pace even.
PART_BYTES: Final = 64 * 1024

# The service model's limit on `Message`.
MESSAGE_CHARACTERS: Final = 2048

_STRING: Final = 7
_FRAME_BYTES: Final = 16  # prelude, its checksum and the message checksum


def encode(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return one message holding string `headers` and `payload`.

    Raises ValueError when a header name exceeds 255 bytes or a value 65,535: the fields have no more room.
    """
    block = b"".join(_header(name, value) for name, value in headers.items())
    prelude = struct.pack(">II", _FRAME_BYTES + len(block) + len(payload), len(block))
    body = prelude + struct.pack(">I", zlib.crc32(prelude)) + block + payload
    return body + struct.pack(">I", zlib.crc32(body))


def payload_part(part: bytes) -> bytes:
    """Return the `PayloadPart` event for `part`; raises ValueError above PART_BYTES."""
    if len(part) > PART_BYTES:
        raise ValueError(f"a part is limited to {PART_BYTES} bytes, this one has {len(part)}")
    return encode(
        {
            ":event-type": "PayloadPart",
            ":content-type": "application/octet-stream",
            ":message-type": "event",
        },
        part,
    )


def model_stream_error(error_code: str, message: str) -> bytes:
    """Return the exception message that SDKs raise as `ModelStreamError`."""
    return _exception("ModelStreamError", {"Message": message, "ErrorCode": error_code})


def internal_stream_failure(message: str) -> bytes:
    """Return the exception message that SDKs raise as `InternalStreamFailure`."""
    return _exception("InternalStreamFailure", {"Message": message})


def _exception(name: str, fields: Mapping[str, str]) -> bytes:
    cut = {key: value[:MESSAGE_CHARACTERS] for key, value in fields.items()}
    return encode(
        {":exception-type": name, ":content-type": "application/json", ":message-type": "exception"},
        json.dumps(cut).encode(),
    )


def _header(name: str, value: str) -> bytes:
    name_bytes, value_bytes = name.encode(), value.encode()
    if not 0 < len(name_bytes) <= 0xFF or len(value_bytes) > 0xFFFF:
        raise ValueError("an event-stream header name or value is too long")
    return struct.pack(
        f">B{len(name_bytes)}sBH{len(value_bytes)}s",
        len(name_bytes),
        name_bytes,
        _STRING,
        len(value_bytes),
        value_bytes,
    )
