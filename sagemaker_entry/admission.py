"""The bound on generations held at once, and the books: every accepted request ends once, in one way.

Owns: the in-flight gauge and the counters accepted = completed + failed + cancelled.
Must not know: why a request ended, beyond the outcome it is told.
Invariant: `close` takes effect once; what was never accepted counts as rejected.
"""

from __future__ import annotations

import enum

from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.metrics import Metrics

RETRY_AFTER_S = 1


class Outcome(enum.StrEnum):
    """How an accepted request ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Admission:
    """One request's place. Workers share the gauge without a lock: the bound may be passed by one each."""

    def __init__(self, metrics: Metrics, limit: int) -> None:
        """Raises ApiError OVERLOADED when all places are taken."""
        if metrics.total("strongroom_requests_in_flight") >= limit:
            metrics.add("strongroom_requests_rejected_total")
            raise ApiError(Code.OVERLOADED, retry_after_s=RETRY_AFTER_S)
        self._metrics = metrics
        self._accepted = False
        self._closed = False
        metrics.add("strongroom_requests_in_flight")

    def accept(self) -> None:
        """The request is valid and on its way to the engine."""
        self._accepted = True
        self._metrics.add("strongroom_requests_accepted_total")

    def close(self, outcome: Outcome) -> None:
        """Give the place back."""
        if self._closed:
            return
        self._closed = True
        self._metrics.add("strongroom_requests_in_flight", -1)
        if self._accepted:
            self._metrics.add(f"strongroom_requests_{outcome.value}_total")
        else:
            self._metrics.add("strongroom_requests_rejected_total")
