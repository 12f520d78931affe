"""What /ping says and whether requests are taken: the engine's page, the drain flag, the text model.

Owns: the verdict in HTTP terms. Must not know: requests. A full queue is healthy.
Invariant: an answer costs a few memory reads and never waits for anyone.
"""

from __future__ import annotations

import time
from typing import Final

from container.ranks.heartbeat import HealthLimits, HeartbeatReader, LoadPhase, Snapshot, Verdict, health
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import Metrics

RETRY_AFTER_S: Final = 5  # a restart takes about as long as a load


class Health:
    """Reads the pages; one per worker."""

    def __init__(
        self,
        reader: HeartbeatReader,
        metrics: Metrics,
        limits: HealthLimits | None = None,
    ) -> None:
        self._reader = reader
        self._metrics = metrics
        self._limits = limits

    def snapshot(self) -> Snapshot:
        """Return the engine's page."""
        return self._reader.read()

    def error(self) -> ApiError | None:
        """Return why requests cannot be taken now, or None."""
        if self._metrics.draining:
            return ApiError(Code.DRAINING, retry_after_s=RETRY_AFTER_S)
        page = self._reader.read()
        verdict = health(page, time.monotonic_ns(), self._limits)
        text_ready = self._metrics.total("text_ready") > 0  # a worker that starts later makes clients wait
        if verdict is Verdict.READY and text_ready:
            return None
        restarted = page.starts > 1 and text_ready
        if verdict in (Verdict.READY, Verdict.STARTING, Verdict.LOADING) and not restarted:
            return ApiError(Code.LOADING, retry_after_s=RETRY_AFTER_S)
        return ApiError(Code.ENGINE_DOWN, retry_after_s=RETRY_AFTER_S)

    def full_s(self) -> int:
        """Return 0 while the engine has room, else the seconds after which a client should try again."""
        return self._reader.read().full_s

    def phase(self) -> dict[str, str]:
        """Return where loading is, for the body of a red /ping."""
        page = self._reader.read()
        known = page.load_phase in LoadPhase._value2member_map_
        phase = LoadPhase(page.load_phase) if known else LoadPhase.NONE
        return {"phase": phase.name.lower()}

    def engine_series(self) -> dict[str, tuple[str, float]]:
        """Return the engine's own metrics: name -> (type, value)."""
        page = self._reader.read()
        return {
            "vllm:num_requests_running": ("gauge", page.running),
            "vllm:num_requests_waiting": ("gauge", page.waiting),
            "vllm:kv_cache_usage_perc": ("gauge", page.kv_used_blocks / max(1, page.kv_total_blocks)),
            "vllm:num_preemptions_total": ("counter", page.preemptions),
            "vllm:prefix_cache_queries_total": ("counter", page.prefix_queried_tokens),
            "vllm:prefix_cache_hits_total": ("counter", page.prefix_hit_tokens),
            "vllm:spec_decode_num_draft_tokens_total": ("counter", page.draft_tokens),
            "vllm:spec_decode_num_accepted_tokens_total": ("counter", page.accepted_tokens),
            "strongroom_engine_steps_total": ("counter", page.steps),
            "strongroom_engine_step_seconds_total": ("counter", page.step_ns_sum / 1e9),
            "strongroom_engine_step_seconds_p99": ("gauge", page.step_p99_ns / 1e9),  # of the last steps
            "strongroom_engine_failed_steps_total": ("counter", page.failed_steps),
            "strongroom_engine_starts_total": ("counter", page.starts),
            "strongroom_engine_ranks": ("gauge", page.ranks),
        }
