"""A client that leaves costs nothing: its sequence is cancelled and its memory freed."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.contract.calls import call, chat, metric, raw_request, wait_for
from tests.contract.conftest import Running

pytestmark = pytest.mark.real_model
LONG = json.dumps(chat("Tell a very long story.", max_tokens=1000, ignore_eos=True)).encode()
LONG_STREAM = json.dumps(
    chat("Tell a very long story.", max_tokens=1000, ignore_eos=True, stream=True)
).encode()


def running(port: int) -> float:
    return metric(port, "vllm:num_requests_running") + metric(port, "vllm:num_requests_waiting")


def settled(port: int) -> bool:
    """Return whether nothing runs or holds memory, and every accepted request has ended in one way."""
    accepted = metric(port, "strongroom_requests_accepted_total")
    ended = sum(
        metric(port, f"strongroom_requests_{how}_total") for how in ("completed", "failed", "cancelled")
    )
    return running(port) == 0 and metric(port, "vllm:kv_cache_usage_perc") == 0 and accepted == ended


@pytest.mark.parametrize("body", [LONG, LONG_STREAM], ids=["whole", "stream"])
def test_leaving_frees_the_sequence_within_a_step_and_a_tenth_of_a_second(
    endpoint: Running, body: bytes
) -> None:
    with raw_request(endpoint.port, "/invocations", body):
        wait_for(lambda: running(endpoint.port) == 1, 20)
        time.sleep(0.3)  # decoding by now
        step_s = metric(endpoint.port, "strongroom_engine_step_seconds_p99")
    # Reading the metric takes a moment of its own, allowed for beside the bar.
    assert wait_for(lambda: running(endpoint.port) == 0, 5) < step_s + 0.1 + 0.15


def test_a_storm_of_clients_that_leave_loses_no_block(endpoint: Running) -> None:
    chance = random.Random(5)
    for number in range(150):
        connection = raw_request(endpoint.port, "/invocations", chance.choice([LONG, LONG_STREAM]))
        if number % 3:
            time.sleep(chance.random() * 0.05)
        connection.close()
    # The last of the storm may still be on their way to a worker when nothing runs for a moment.
    wait_for(lambda: settled(endpoint.port) and settled(endpoint.port), 20)
    assert call(endpoint.port, "POST", "/invocations", chat()).status == 200
