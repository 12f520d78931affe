"""The metrics page and its text; what a running server exports."""

from __future__ import annotations

import os
import re

from sagemaker_entry import metrics
from sagemaker_entry.admission import Admission, Outcome
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import Metrics
from tests.sagemaker_entry.harness import Server

LINE = re.compile(r'[a-z_]+(:[a-z0-9_]+|[a-z0-9_]*)(\{([a-z_]+="[^"\n]*",?)+\})? [0-9.e+-]+')


def test_regions_are_summed_and_a_new_writer_starts_with_empty_gauges() -> None:
    fd = metrics.create()
    first, second, reader = Metrics(fd, 1), Metrics(fd, 2), Metrics(fd)
    first.add("strongroom_requests_accepted_total", 3)
    second.add("strongroom_requests_accepted_total", 4)
    second.add("strongroom_requests_in_flight", 2)
    second.put("text_ready", 1)
    assert reader.total("strongroom_requests_accepted_total") == 7
    replaced = Metrics(fd, 2)
    replaced.reset_gauges()
    assert reader.total("strongroom_requests_in_flight") == 0
    assert reader.total("text_ready") == 0
    assert reader.total("strongroom_requests_accepted_total") == 7
    os.close(fd)


def test_the_drain_flag_is_seen_by_every_writer() -> None:
    fd = metrics.create()
    supervisor, worker = Metrics(fd), Metrics(fd, 5)
    assert not worker.draining
    supervisor.drain()
    assert worker.draining
    os.close(fd)


def test_histograms_are_cumulative_and_end_with_infinity() -> None:
    fd = metrics.create()
    page = Metrics(fd, 1)
    for value in (0.2, 0.4, 9999.0):
        page.observe("vllm:e2e_request_latency_seconds", value)
    text = page.text("m", {})
    counts = [float(v) for v in re.findall(r"e2e_request_latency_seconds_bucket\{.*\} (\S+)", text)]
    assert counts == sorted(counts)
    assert (counts[0], counts[1], counts[-1]) == (1, 2, 3)
    assert 'le="+Inf"} 3' in text
    assert re.search(r"e2e_request_latency_seconds_sum\{.*\} 9999.6", text)
    assert re.search(r"e2e_request_latency_seconds_count\{.*\} 3\n", text)
    os.close(fd)


def test_the_text_can_never_grow_beyond_the_bound_whatever_is_asked() -> None:
    assert metrics.series_bound() <= metrics.MAX_SERIES
    fd = metrics.create()
    page = Metrics(fd, 1)
    for i in range(2000):
        page.responded(f"/typed-by-a-client/{i}", 200 + i % 400)
    for route in metrics.ROUTES:
        for status in metrics.STATUSES:
            page.responded(route, status)
    text = page.text('quo"te\n\\', {})
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) <= metrics.MAX_SERIES
    assert "typed-by-a-client" not in text
    assert 'model_name="quo\\"te\\n\\\\"' in text
    os.close(fd)


def test_the_books_balance_and_close_once() -> None:
    fd = metrics.create()
    page = Metrics(fd, 1)
    for outcome in Outcome:
        admission = Admission(page, 10)
        admission.accept()
        admission.close(outcome)
        admission.close(Outcome.FAILED)
        assert page.total(f"strongroom_requests_{outcome.value}_total") == 1
    Admission(page, 10).close(Outcome.FAILED)  # refused before it was accepted
    assert page.total("strongroom_requests_accepted_total") == 3
    assert page.total("strongroom_requests_rejected_total") == 1
    assert page.total("strongroom_requests_in_flight") == 0
    os.close(fd)


def test_the_bound_on_requests_counts_all_workers() -> None:
    fd = metrics.create()
    first, second = Metrics(fd, 1), Metrics(fd, 2)
    held = [Admission(first, 2), Admission(second, 2)]
    try:
        Admission(first, 2)
        raise AssertionError("a third request was let in")
    except ApiError as error:
        assert (error.code, error.status, error.retry_after_s) == (Code.OVERLOADED, 429, 1)
    held[0].close(Outcome.COMPLETED)
    Admission(first, 2).close(Outcome.COMPLETED)
    held[1].close(Outcome.COMPLETED)
    os.close(fd)


def test_a_running_server_exports_the_names_dashboards_know(server: Server) -> None:
    generated = server.metric("vllm:generation_tokens_total")
    first = server.metric("vllm:time_to_first_token_seconds_count")
    length = server.metric(
        'vllm:request_success_total{model_name="model",engine="0",finished_reason="length"}'
    )
    assert server.invoke({"prompt": "abc", "max_tokens": 4}, "/v1/completions")[0] == 200
    status, headers, body = server.request("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in lines), [x for x in lines if not LINE.fullmatch(x)][:3]
    assert len(lines) <= metrics.MAX_SERIES
    assert server.metric("vllm:generation_tokens_total") == generated + 4
    assert server.metric("vllm:time_to_first_token_seconds_count") == first + 1
    after = server.metric(
        'vllm:request_success_total{model_name="model",engine="0",finished_reason="length"}'
    )
    assert after == length + 1
    names = {line.split("{")[0].split(" ")[0] for line in lines}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "strongroom_http_responses_total",
        "strongroom_requests_accepted_total",
    ):
        assert name in names, name
