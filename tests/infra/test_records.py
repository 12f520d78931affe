"""How batch transform cuts inputs, filters records and assembles outputs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infra.emulator.records import BadRecords, Shape, check_shape, output, payloads, request_body, select

LINES = b'{"a":1}\n{"a":2}\r\n\n{"a":3}'


def cut(data: bytes, **shape: Any) -> list[list[bytes]]:
    return list(payloads(data, Shape(**shape)))


def test_an_unsplit_input_is_one_payload_whatever_the_strategy() -> None:
    for strategy in ("MultiRecord", "SingleRecord"):
        assert cut(LINES, strategy=strategy) == [[LINES]]
    assert request_body([LINES], Shape()) == LINES


def test_a_single_record_strategy_sends_one_line_at_a_time() -> None:
    assert cut(LINES, split="Line", strategy="SingleRecord") == [[b'{"a":1}'], [b'{"a":2}'], [b'{"a":3}']]


@pytest.mark.parametrize(("limit_bytes", "sizes"), [(15, [1, 1, 1]), (16, [2, 1]), (23, [2, 1]), (24, [3])])
def test_a_multi_record_payload_is_filled_up_to_its_limit(limit_bytes: int, sizes: list[int]) -> None:
    shape = Shape(split="Line", payload_bytes=limit_bytes)
    found = list(payloads(LINES, shape))
    assert [len(records) for records in found] == sizes
    assert all(len(request_body(records, shape)) <= limit_bytes for records in found)


def test_a_record_at_the_limit_passes_and_one_byte_more_fails_the_file() -> None:
    assert len(cut(b"x" * 10, payload_bytes=10)) == 1
    with pytest.raises(BadRecords, match="11 bytes"):
        cut(b"x" * 11, payload_bytes=10)
    assert len(cut(b"x" * 11, payload_bytes=0)) == 1


def test_an_empty_input_has_no_payload_when_split() -> None:
    assert cut(b"\n\n", split="Line") == []


def test_answers_are_assembled_with_one_line_end_or_none() -> None:
    assert output([b"x"], b"y\n", Shape(split="Line", assemble="Line")) == b"y\n"
    assert output([b"x"], b"y", Shape(split="Line", assemble="Line")) == b"y\n"
    assert output([b"x"], b"y", Shape()) == b"y"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("$", {"a": [{"b c": 5}, 6, 7]}),
        ("$.a", [{"b c": 5}, 6, 7]),
        ("$.a[0]['b c']", 5),
        ("$['a'][-1]", 7),
        ("$.a[1:]", [6, 7]),
        ("$.a[:1]", [{"b c": 5}]),
    ],
)
def test_a_filter_selects_by_name_index_and_slice(path: str, found: Any) -> None:
    assert select({"a": [{"b c": 5}, 6, 7]}, path) == found


@pytest.mark.parametrize("path", ["a", "$..a", "$.*", "$[?(@.a)]", "$.a[", "$ .a"])
def test_a_filter_that_is_not_read_is_refused_before_the_job_runs(path: str) -> None:
    with pytest.raises(BadRecords):
        check_shape(Shape(input_filter=path))
    with pytest.raises(BadRecords):
        check_shape(Shape(output_filter=path))


@pytest.mark.parametrize("path", ["$.b", "$[0]", "$.a.b"])
def test_a_filter_that_selects_nothing_fails_the_file(path: str) -> None:
    with pytest.raises(BadRecords):
        select({"a": 1}, path)


def test_join_adds_the_answer_to_its_own_record() -> None:
    shape = Shape(split="Line", assemble="Line", join="Input")
    made = output([b'{"id":1}', b"2"], b'{"x":1}\n{"x":2}\n', shape)
    assert [json.loads(line) for line in made.splitlines()] == [
        {"id": 1, "SageMakerOutput": {"x": 1}},
        {"SageMakerInput": 2, "SageMakerOutput": {"x": 2}},
    ]
    with pytest.raises(BadRecords, match="2 records have 1 answers"):
        output([b"{}", b"{}"], b"{}", shape)


def test_input_and_output_filters_work_on_what_is_sent_and_on_the_joined_record() -> None:
    shape = Shape(
        split="Line", assemble="Line", input_filter="$.body", output_filter="$.SageMakerOutput", join="Input"
    )
    records = [b'{"id":1,"body":{"prompt":"x"}}']
    assert request_body(records, shape) == b'{"prompt":"x"}\n'
    assert output(records, b'{"y":2}\n', shape) == b'{"y":2}\n'
    with pytest.raises(BadRecords, match="not JSON"):
        request_body([b"x"], shape)


@pytest.mark.parametrize("split", ["RecordIO", "TFRecord"])
def test_what_is_not_emulated_is_refused(split: str) -> None:
    with pytest.raises(BadRecords, match=split):
        check_shape(Shape(split=split))
    with pytest.raises(BadRecords, match="JoinSource"):
        check_shape(Shape(split="Line", join="Input"))
