"""The emulator's page states the limits that the code enforces."""

from __future__ import annotations

from pathlib import Path

from infra.emulator import Limits
from infra.emulator.accepting import TIMEOUT_RANGE_S, TTL_RANGE_S
from infra.emulator.headers import CUSTOM_ATTRIBUTES, REQUEST
from infra.emulator.queueing import INLINE_BYTES
from infra.emulator.stores import OBJECT_BYTES
from infra.emulator.transform import PAYLOAD_MB, RETRIES
from infra.validation import BATCH_MB

PAGE = Path(__file__).parents[2] / "infra" / "emulator" / "README.md"


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    limits = Limits()
    for said in (
        f"| {limits.body_bytes:,} bytes",
        f"| {limits.response_s:.0f} s, {limits.stream_s:.0f} s |",
        f"| {REQUEST[CUSTOM_ATTRIBUTES].characters:,} printable",
        f"| {INLINE_BYTES:,} bytes; input in the store {OBJECT_BYTES // 1024**3} GiB |",
        f"| {TIMEOUT_RANGE_S[0]} to {TIMEOUT_RANGE_S[1]:,}, {TTL_RANGE_S[0]} to {TTL_RANGE_S[1]:,} |",
        f"`MaxConcurrentTransforms` | {PAYLOAD_MB} |",
        f"| {RETRIES}, 3,600 s |",
    ):
        assert said in text, said
    assert BATCH_MB == PAYLOAD_MB
