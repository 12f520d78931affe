"""Counters shared by every process of the front, and their Prometheus text.

Owns: the page's fixed layout, the closed sets of label values, the text format.
Must not know: requests, content, anything a client typed. Also used by the supervisor: no gevent, no HTTP.
Invariant: each region has one writer; the series are fixed before the first request, at most MAX_SERIES.

    | region 0: supervisor | region 1: worker 1 | region 2: worker 2 | ...     each SLOTS float64
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Final

from sagemaker_entry.errors import TABLE

MAX_WORKERS: Final = 16
MAX_SERIES: Final = 500
ENGINE_SERIES: Final = 20

ROUTES: Final = (
    "/ping",
    "/invocations",
    "/",
    "/generate",
    "/generate_stream",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/tokenize",
    "/chat_tokenize",
    "/info",
    "/health",
    "/metrics",
    "/execution-parameters",
    "other",
)
STATUSES: Final = tuple(sorted({200, 422, 424, *(rule.status for rule in TABLE.values())}))
FINISHED: Final = ("stop", "length", "abort", "error")

_E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

HISTOGRAMS: Final[dict[str, tuple[float, ...]]] = {
    "vllm:time_to_first_token_seconds": _TTFT,
    "vllm:inter_token_latency_seconds": _TOKEN,
    "vllm:request_time_per_output_token_seconds": _TOKEN,
    "vllm:e2e_request_latency_seconds": _E2E,
    "vllm:request_prompt_tokens": _COUNTS,
    "vllm:request_generation_tokens": _COUNTS,
}
COUNTERS: Final = (
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "strongroom_requests_accepted_total",
    "strongroom_requests_completed_total",
    "strongroom_requests_failed_total",
    "strongroom_requests_cancelled_total",
    "strongroom_requests_rejected_total",
    "strongroom_grammar_violations_total",
    "strongroom_grammar_unjudged_total",
    "strongroom_metered_units_total",
    "strongroom_engine_restarts_total",
    "strongroom_front_restarts_total",
)
GAUGES: Final = ("strongroom_requests_in_flight", "strongroom_connections_open")
# Not exposed as they are: `draining` is the supervisor's, `text_ready` each worker's, `locked` both's.
FLAGS: Final = ("draining", "text_ready", "locked")


def _layout() -> dict[str, int]:
    """Return the first slot of every named series; histograms take one slot per bucket, +Inf and the sum."""
    slots: dict[str, int] = {}
    at = 0
    for name in (*COUNTERS, *GAUGES, *FLAGS):
        slots[name] = at
        at += 1
    for finished in FINISHED:
        slots[f"finished {finished}"] = at
        at += 1
    for route in ROUTES:
        for status in STATUSES:
            slots[f"{route} {status}"] = at
            at += 1
    for name, buckets in HISTOGRAMS.items():
        slots[name] = at
        at += len(buckets) + 2
    slots["end"] = at
    return slots


SLOT: Final = _layout()
SLOTS: Final = SLOT["end"]
PAGE_BYTES: Final = (MAX_WORKERS + 1) * SLOTS * 8


def create() -> int:
    """Return a descriptor of a fresh zeroed page in memory, to be inherited; it never has a file name."""
    fd = os.memfd_create("strongroom-metrics", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE_BYTES)
    return fd


class Metrics:
    """The page as seen by one writer; `region` 0 is the supervisor's."""

    def __init__(self, fd: int, region: int = 0) -> None:
        self._cells = memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("d")
        self.region = region
        self._region = region * SLOTS

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter or gauge of this region."""
        self._cells[self._region + SLOT[name]] += amount

    def put(self, name: str, value: float) -> None:
        """Set a gauge or flag of this region."""
        self._cells[self._region + SLOT[name]] = value

    def own(self, name: str) -> float:
        """Return the value in this region."""
        return self._cells[self._region + SLOT[name]]

    def supervisor(self, name: str) -> float:
        """Return the value in the supervisor's region."""
        return self._cells[SLOT[name]]

    def total(self, name: str) -> float:
        """Return the sum over all regions."""
        slot = SLOT[name]
        return sum(self._cells[slot + region * SLOTS] for region in range(MAX_WORKERS + 1))

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Count `value` into a histogram, `times` times."""
        buckets = HISTOGRAMS[name]
        at = self._region + SLOT[name]
        index = next((i for i, bound in enumerate(buckets) if value <= bound), len(buckets))
        self._cells[at + index] += times
        self._cells[at + len(buckets) + 1] += value * times

    def responded(self, route: str, status: int) -> None:
        """Count one HTTP response; a route or status outside the closed sets counts as other or 500."""
        route = route if route in ROUTES else "other"
        self.add(f"{route} {status if status in STATUSES else 500}")

    def reset_gauges(self) -> None:
        """Zero this region's gauges: its former writer died holding them."""
        for name in (*GAUGES, "text_ready", "locked"):
            self.put(name, 0)

    @property
    def draining(self) -> bool:
        return self._cells[SLOT["draining"]] != 0

    def drain(self) -> None:
        """Tell every worker, at once, to refuse new requests. Only the supervisor does this."""
        self._cells[SLOT["draining"]] = 1

    def text(self, model: str, engine: Mapping[str, tuple[str, float]]) -> str:
        """Return the Prometheus text; `engine` adds name -> (type, value) read from the engine's page."""
        labels = f'model_name="{_escape(model)}",engine="0"'
        lines: list[str] = []
        for name in COUNTERS:
            lines += [f"# TYPE {name} counter", f"{name}{_braces(name, labels)} {_number(self.total(name))}"]
        for name in GAUGES:
            lines += [f"# TYPE {name} gauge", f"{name} {_number(self.total(name))}"]
        for name, (kind, value) in engine.items():
            lines += [f"# TYPE {name} {kind}", f"{name}{_braces(name, labels)} {_number(value)}"]
        lines.append("# TYPE vllm:request_success_total counter")
        for finished in FINISHED:
            count = _number(self.total(f"finished {finished}"))
            lines.append(f'vllm:request_success_total{{{labels},finished_reason="{finished}"}} {count}')
        lines += self._responses()
        for name, buckets in HISTOGRAMS.items():
            lines += self._histogram(name, buckets, labels)
        return "\n".join([*lines, ""])

    def _responses(self) -> list[str]:
        lines = ["# TYPE strongroom_http_responses_total counter"]
        for route in ROUTES:
            for status in STATUSES:
                count = self.total(f"{route} {status}")
                if count:  # the full cross product is fixed but mostly empty
                    pair = f'route="{route}",status="{status}"'
                    lines.append(f"strongroom_http_responses_total{{{pair}}} {_number(count)}")
        return lines

    def _histogram(self, name: str, buckets: tuple[float, ...], labels: str) -> list[str]:
        at = SLOT[name]
        cells = [
            sum(self._cells[at + i + region * SLOTS] for region in range(MAX_WORKERS + 1))
            for i in range(len(buckets) + 2)
        ]
        lines = [f"# TYPE {name} histogram"]
        running = 0.0
        for bound, count in zip((*buckets, "+Inf"), cells, strict=False):
            running += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {_number(running)}')
        lines.append(f"{name}_sum{{{labels}}} {_number(cells[-1])}")
        lines.append(f"{name}_count{{{labels}}} {_number(running)}")
        return lines


def series_bound() -> int:
    """Return the most series the text can ever hold, with at most ENGINE_SERIES from the engine's page."""
    histograms = sum(len(buckets) + 3 for buckets in HISTOGRAMS.values())
    return (
        len(COUNTERS) + len(GAUGES) + ENGINE_SERIES + len(FINISHED) + len(ROUTES) * len(STATUSES) + histograms
    )


def _braces(name: str, labels: str) -> str:
    return f"{{{labels}}}" if name.startswith("vllm:") else ""


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
