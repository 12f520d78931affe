"""The event-stream encoder, against botocore's own decoder."""

from __future__ import annotations

import json
import random
import struct
import zlib
from typing import Any

import pytest
from botocore.eventstream import EventStreamBuffer

from infra.emulator import eventstream
from infra.emulator.eventstream import PART_BYTES
from infra.emulator.splitting import RANDOM_PART_BYTES, Split


def decode(data: bytes) -> list[Any]:
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    return list(buffer)


def test_a_part_decodes_to_the_bytes_that_went_in() -> None:
    for payload in (b"", b"a", "schön ☂".encode()[:-1], bytes(range(256)) * 10, b"x" * PART_BYTES):
        (message,) = decode(eventstream.payload_part(payload))
        assert message.payload == payload
        assert message.headers == {
            ":event-type": "PayloadPart",
            ":content-type": "application/octet-stream",
            ":message-type": "event",
        }


def test_messages_decode_one_by_one_however_the_bytes_are_cut() -> None:
    draw = random.Random(7)
    payloads = [draw.randbytes(draw.randint(0, 300)) for _ in range(50)]
    data = b"".join(eventstream.payload_part(payload) for payload in payloads)
    buffer = EventStreamBuffer()
    seen: list[bytes] = []
    while data:
        size = draw.randint(1, 100)
        buffer.add_data(data[:size])
        seen += [message.payload for message in buffer]
        data = data[size:]
    assert seen == payloads


def test_the_layout_is_the_documented_one() -> None:
    data = eventstream.encode({"a": "bc"}, b"payload")
    total, header_bytes, prelude_crc = struct.unpack(">III", data[:12])
    assert total == len(data) == 12 + 7 + 7 + 4
    assert header_bytes == 7
    assert prelude_crc == zlib.crc32(data[:8])
    assert data[12:19] == b"\x01a\x07\x00\x02bc"
    assert data[19:26] == b"payload"
    assert struct.unpack(">I", data[-4:])[0] == zlib.crc32(data[:-4])


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    data = eventstream.payload_part(b"some payload")
    for index in range(12, len(data)):
        broken = bytearray(data)
        broken[index] ^= 1
        with pytest.raises(Exception, match="Checksum mismatch"):
            decode(bytes(broken))


@pytest.mark.parametrize("code", ["StreamBroken", "ModelInvocationTimeExceeded"])
def test_a_stream_error_is_an_exception_message_with_both_fields(code: str) -> None:
    (message,) = decode(eventstream.model_stream_error(code, "why"))
    assert message.headers[":message-type"] == "exception"
    assert message.headers[":exception-type"] == "ModelStreamError"
    assert message.headers[":content-type"] == "application/json"
    assert json.loads(message.payload) == {"Message": "why", "ErrorCode": code}


def test_an_internal_failure_has_its_own_type() -> None:
    (message,) = decode(eventstream.internal_stream_failure("why"))
    assert message.headers[":exception-type"] == "InternalStreamFailure"
    assert json.loads(message.payload) == {"Message": "why"}


def test_a_message_text_is_cut_to_the_models_limit() -> None:
    (message,) = decode(eventstream.model_stream_error("StreamBroken", "x" * 5000))
    assert len(json.loads(message.payload)["Message"]) == 2048


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="limited to"):
        eventstream.payload_part(b"x" * (PART_BYTES + 1))
    with pytest.raises(ValueError, match="too long"):
        eventstream.encode({"n" * 256: "v"}, b"")
    with pytest.raises(ValueError, match="too long"):
        eventstream.encode({"n": "v" * 65536}, b"")
    with pytest.raises(ValueError, match="too long"):
        eventstream.encode({"": "v"}, b"")


@pytest.mark.parametrize("mode", ["none", "bytes=1", "bytes=7", "bytes=65536", "random:1", "random:99"])
def test_parts_joined_are_the_piece_and_none_is_empty(mode: str) -> None:
    draw = random.Random(3)
    cut = Split.parse(mode).cutter()
    for size in (0, 1, 2, 23, 24, 25, 1000, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES):
        piece = draw.randbytes(size)
        parts = list(cut(piece))
        assert b"".join(parts) == piece
        assert all(0 < len(part) <= PART_BYTES for part in parts)


def test_the_random_mode_repeats_for_a_seed_and_cuts_characters() -> None:
    text = "data: ☂☂☂☂☂☂☂☂☂☂\n\n".encode() * 5
    first = list(Split.parse("random:5").cutter()(text))
    assert first == list(Split.parse("random:5").cutter()(text))
    assert first != list(Split.parse("random:6").cutter()(text))
    assert max(map(len, first)) <= RANDOM_PART_BYTES
    assert any(part[0] & 0xC0 == 0x80 for part in first), "no part begins inside a character"


def test_unknown_split_modes_are_refused() -> None:
    for text in ("", "bytes", "bytes=", "bytes=0", "bytes=-1", "bytes=65537", "random", "random:x", "lines"):
        with pytest.raises(ValueError, match="split"):
            Split.parse(text)
