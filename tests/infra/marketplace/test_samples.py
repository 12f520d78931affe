"""Samples are what a server answered: byte for byte, through the calls the platform makes."""

from __future__ import annotations

import json

import pytest

from infra.marketplace import samples
from infra.report import CommandError
from tests.infra.marketplace import making

ASKED = making.words().samples


def test_answers_are_kept_as_they_came_and_lines_keep_their_order() -> None:
    with making.server() as running:
        recording, files = samples.record(running.address, ASKED)
    asked = [json.loads(line)["messages"][0]["content"] for line in files[samples.BATCH_INPUT].splitlines()]
    answered = [json.loads(line)["asked"] for line in files[samples.BATCH_OUTPUT].splitlines()]
    assert asked == answered == list(ASKED.prompts)
    assert json.loads(files[samples.REALTIME_OUTPUT])["asked"] == ASKED.prompts[0]
    assert json.loads(files[samples.STREAM_INPUT])["stream"] is True
    assert samples.faults(recording, files) == []
    assert {path for path, _ in running.calls} == {"/invocations"}


def test_a_server_that_knows_json_lines_gets_its_batch_so() -> None:
    with making.server(lines=True) as running:
        assert samples.record(running.address, ASKED)[0].batch_type == "application/jsonlines"
    with making.server(lines=False) as running:
        assert samples.record(running.address, ASKED)[0].batch_type == "application/json"


@pytest.mark.parametrize(
    ("text", "metered"),
    [
        (making.METERED, True),
        ("", False),
        ("{", False),
        ("[]", False),
        ('{"Dimension": "tokens", "ConsumedUnits": 1}', False),
        ('{"Dimension": "inference.count", "ConsumedUnits": 0}', False),
        ('{"Dimension": "inference.count", "ConsumedUnits": "1"}', False),
    ],
)
def test_metering_counts_only_as_aws_reads_it(text: str, metered: bool) -> None:
    with making.server(metering=text) as running:
        assert samples.record(running.address, ASKED)[0].metered is metered


def test_whether_the_server_was_locked_is_recorded() -> None:
    for locked in (True, False):
        with making.server(locked=locked) as running:
            assert samples.record(running.address, ASKED)[0].locked is locked


@pytest.mark.parametrize("address", ["", "localhost", "localhost:x", "localhost:0", ":80", "localhost:65536"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(CommandError, match="bad_argument"):
        samples.record(address, ASKED)


def test_a_server_that_is_not_ready_or_not_there_is_not_recorded() -> None:
    with making.server(ping=503) as running, pytest.raises(CommandError) as caught:
        samples.record(running.address, ASKED)
    assert "`/ping` does not say 200" in caught.value.message
    with pytest.raises(CommandError) as caught:
        samples.record(running.address, ASKED)
    assert "does not answer" in caught.value.message and caught.value.hint


def test_an_answer_beyond_all_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ANSWER_BYTES", 10)
    with making.server() as running, pytest.raises(CommandError) as caught:
        samples.record(running.address, ASKED)
    assert "more than 10 bytes" in caught.value.message
