"""What /ping says and whether requests are taken: the engine's page, the drain flag, the text model.

Owns: the verdict in HTTP terms. Must not know: requests. A full queue is healthy.
Invariant: an answer costs a few memory reads and never waits for anyone.
"""

from __future__ import annotations

import enum
import time
from typing import Final

from container.ranks.heartbeat import HealthLimits, HeartbeatReader, LoadPhase, Snapshot, Verdict, health
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import Metrics

DAY_S: Final = 86_400
RETRY_AFTER_S: Final = 5  # a restart takes about as long as a load


class Lock(enum.StrEnum):
    """Whether the kernel refuses every process each way out."""

    ON = "on"
    PENDING = "pending"  # asked for, not yet proven by all
    OFF = "off"  # the operator switched it off


class Seal(enum.StrEnum):
    """How the model came here."""

    SEALED = "sealed"
    LOCKED = "locked"  # sealed, and its key has yet to come in a call
    PLAINTEXT = "plaintext"  # the operator allows it


# What `locked` says in a region of the metrics page.
HOLDS, HOLDS_IN_PART = 1, 2


class Health:
    """Reads the pages; one per worker."""

    def __init__(
        self,
        reader: HeartbeatReader,
        metrics: Metrics,
        limits: HealthLimits | None = None,
        *,
        lockdown: bool,
        sealed: bool = False,
    ) -> None:
        """`lockdown`: nothing is healthy before it holds. `sealed`: the model is opened from a package."""
        self._reader = reader
        self._metrics = metrics
        self._limits = limits
        self._lockdown = lockdown
        self._sealed = sealed
        self.licence_end_s: int | None = None  # since 1970, once it is known that there is one

    def snapshot(self) -> Snapshot:
        """Return the engine's page."""
        return self._reader.read()

    def error(self) -> ApiError | None:
        """Return why requests cannot be taken now, or None."""
        if self._metrics.draining:
            return ApiError(Code.DRAINING, retry_after_s=RETRY_AFTER_S)
        page = self._reader.read()
        verdict = health(page, time.monotonic_ns(), self._limits)
        if self._waits(page, verdict) and self._front_locked():
            return ApiError(Code.LOCKED, retry_after_s=RETRY_AFTER_S)
        text_ready = self._metrics.total("text_ready") > 0  # a worker that starts later makes clients wait
        if verdict is Verdict.READY and text_ready and self.lock() is not Lock.PENDING:
            return None
        restarted = page.starts > 1 and text_ready
        if verdict in (Verdict.READY, Verdict.STARTING, Verdict.LOADING) and not restarted:
            return ApiError(Code.LOADING, retry_after_s=RETRY_AFTER_S)
        return ApiError(Code.ENGINE_DOWN, retry_after_s=RETRY_AFTER_S)

    def full_s(self) -> int:
        """Return 0 while the engine has room, else the seconds after which a client should try again."""
        return self._reader.read().full_s

    def lock(self) -> Lock:
        """Return whether the lockdown holds in the supervisor, in this worker and in every rank."""
        if not self._lockdown:
            return Lock.OFF
        page = self._reader.read()
        return Lock.ON if self._front_locked() and page.locked >= max(1, page.ranks) else Lock.PENDING

    def _front_locked(self) -> bool:
        proven = self._metrics.supervisor("locked") and self._metrics.own("locked")
        return bool(proven) or not self._lockdown

    def locked(self) -> bool:
        """Return whether the engine waits for its key."""
        page = self._reader.read()
        return self._waits(page, health(page, time.monotonic_ns(), self._limits))

    @staticmethod
    def _waits(page: Snapshot, verdict: Verdict) -> bool:
        return verdict is Verdict.LOADING and page.load_phase == LoadPhase.LOCKED

    def seal(self) -> Seal:
        """Return how the model came here."""
        if not self._sealed:
            return Seal.PLAINTEXT
        return Seal.LOCKED if self.locked() else Seal.SEALED

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
            "strongroom_package_sealed": ("gauge", self._sealed),
            **self._licence_series(),
            # One that keeps sockets for ranks that connect is not counted as locked.
            "strongroom_lockdown_supervisor": ("gauge", self._metrics.supervisor("locked") == HOLDS),
            "strongroom_lockdown_front": ("gauge", self._metrics.own("locked")),
            "strongroom_lockdown_ranks": ("gauge", page.locked),
        }

    def _licence_series(self) -> dict[str, tuple[str, float]]:
        if self.licence_end_s is None:
            return {}
        days = -((time.time() - self.licence_end_s) // DAY_S)  # one that has begun counts; below 0: grace
        return {"strongroom_licence_days_left": ("gauge", days)}
