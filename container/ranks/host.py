"""The engine's main loop: arrivals in, steps, deltas out, one beat per turn.

Owns: the order of a turn, which requests are live for whom, draining, what the heartbeat page says.
Must not know: sockets (the switchboard's), tensors (the runner's), policy (the engine's). No torch.
Invariant: arrivals and cancels take effect at step start only; every request a connection sent gets exactly
one final delta per choice unless it was cancelled or its connection has gone.

    one turn: inbox -> engine.submit / cancel -> engine.step -> one frame per connection -> page
    idle: blocked on the inbox, waking only to beat
"""

from __future__ import annotations

import os
import queue
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Final, Protocol

from container.engine.request import EngineRequest, ErrorCode, Refused, RequestKey, SequenceDelta
from container.ranks.heartbeat import EngineState, HeartbeatWriter
from container.ranks.messages import Delta
from container.ranks.switchboard import (
    Arrival,
    Cancellation,
    Item,
    Lost,
    Signal,
    Switchboard,
    batch_frames,
)
from container.ranks.translation import error_deltas, to_delta

IDLE_BEAT_S: Final = 0.5  # two beats a second cost nothing measurable
FRUITLESS_PAUSE_S: Final = (
    0.005  # between steps that move nothing, so that a stuck engine does not burn a core
)
DRAIN_S: Final = 25.0  # SIGKILL follows SIGTERM by 30 s on SageMaker
STEP_WINDOW: Final = 256  # step times the p99 is taken over
P99_EVERY_STEPS: Final = 16


class StatsLike(Protocol):
    """What the page takes over from container.engine.stats.Stats."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def prefix_queried_tokens(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def completed(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def draft_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def failed_steps(self) -> int: ...


class EngineLike(Protocol):
    """The part of container.engine.engine.Engine that the host drives, from one thread."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, key: RequestKey, choice: int | None = None) -> None: ...
    def cancel_connection(self, connection: int) -> None: ...
    def step(self) -> list[SequenceDelta]: ...
    def drain(self) -> None: ...
    def stats(self) -> StatsLike: ...
    def refusal(self, ahead: int) -> Refused | None: ...


class IoFailed(Exception):
    """The IO thread died; nobody can reach this engine any more."""


class StepTimes:
    """Sum and rolling 99th percentile of step durations, in nanoseconds."""

    def __init__(self) -> None:
        self._window: deque[int] = deque(maxlen=STEP_WINDOW)
        self._until_p99 = 0
        self.sum_ns = 0
        self.p99_ns = 0

    def observe(self, step_ns: int) -> None:
        self.sum_ns += step_ns
        self._window.append(step_ns)
        if self._until_p99 == 0:
            self._until_p99 = P99_EVERY_STEPS
            ordered = sorted(self._window)
            self.p99_ns = ordered[(len(ordered) * 99 - 1) // 100]
        self._until_p99 -= 1


class Host:
    """Drives one engine for all connections of a switchboard until it is told to leave.

    Raises from `run` what `engine.step` raises, and IoFailed: both end the process.
    """

    def __init__(
        self,
        engine: EngineLike,
        switchboard: Switchboard,
        page: HeartbeatWriter,
        *,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._engine = engine
        self._switchboard = switchboard
        self._page = page
        self._drain_s = drain_s
        self._live: dict[RequestKey, int] = {}  # bit c set: choice c has not ended
        self._outgoing: dict[int, list[Delta]] = defaultdict(list)
        self._state = EngineState.READY
        self._leave_at_s: float | None = None
        self._steps_seen = engine.stats().steps
        self._progressed = True
        self._times = StepTimes()

    # Safe in a signal handler: SimpleQueue.put is reentrant

    def request_drain(self) -> None:
        """Finish what runs, within `drain_s`, refuse the rest, then return from `run`."""
        self._switchboard.inbox.put(Signal.DRAIN)

    def request_stop(self) -> None:
        """End what runs with an error now and return from `run`."""
        self._switchboard.inbox.put(Signal.STOP)

    def run(self) -> None:
        """Serve until drained. The page says READY from the first turn on and STOPPED at the end."""
        self._switchboard.start()
        try:
            self._beat()
            while not self._done():
                self._apply_inbox()
                if self._engine.has_work:
                    self._beat()  # says "busy" before a step that may hang
                    self._step()
                self._send()
                if not self._engine.has_work:
                    self._beat()
            self._end_the_rest()
        finally:
            self._switchboard.close()
        self._state = EngineState.STOPPED
        self._beat()

    # One turn

    def _done(self) -> bool:
        if self._leave_at_s is None:
            return False
        return not self._engine.has_work or time.monotonic() >= self._leave_at_s

    def _apply_inbox(self) -> None:
        """Apply all that has arrived; wait for something first when there is nothing to run."""
        inbox = self._switchboard.inbox
        wait_s = self._wait_s()
        if wait_s > 0.0:
            try:
                self._apply(inbox.get(timeout=wait_s))
            except queue.Empty:
                return
        for _ in range(inbox.qsize()):
            self._apply(inbox.get())

    def _wait_s(self) -> float:
        if not self._engine.has_work:
            return IDLE_BEAT_S
        return 0.0 if self._progressed else FRUITLESS_PAUSE_S

    def _apply(self, item: Item) -> None:
        if isinstance(item, Arrival):
            self._submit(item.request)
            self._switchboard.applied(item)
        elif isinstance(item, Cancellation):
            self._cancel(item.key, item.choice)
        elif isinstance(item, Lost):
            self._live = {k: open_ for k, open_ in self._live.items() if k.connection != item.connection}
            self._engine.cancel_connection(item.connection)
        elif item is Signal.IO_FAILED:
            raise IoFailed
        else:
            self._leave(0.0 if item is Signal.STOP else self._drain_s)

    def _submit(self, request: EngineRequest) -> None:
        key = request.key
        if key in self._live:  # a broken front: the answer would be two streams under one name, so neither
            del self._live[key]
            self._engine.cancel(key)
            self._refuse(request, ErrorCode.INVALID)
            return
        try:
            self._engine.submit(request)
        except Refused as refused:
            self._refuse(request, refused.code, refused.retry_after_s)
        else:
            self._live[key] = (1 << request.choices) - 1

    def _cancel(self, key: RequestKey, choice: int | None) -> None:
        open_choices = self._live.get(key, 0)
        leaving = open_choices if choice is None else open_choices & 1 << choice
        if not leaving:
            return  # it has ended, or was never here
        self._close(key, leaving)
        self._engine.cancel(key, choice)

    def _close(self, key: RequestKey, choices: int) -> None:
        """Take these choices (bits) off what is live; what they still bring is for nobody."""
        self._live[key] &= ~choices
        if not self._live[key]:
            del self._live[key]

    def _refuse(self, request: EngineRequest, code: ErrorCode, retry_after_s: int | None = None) -> None:
        choices = range(max(1, request.choices))
        self._outgoing[request.key.connection] += error_deltas(
            request.key.id, choices, code, retry_after_s=retry_after_s
        )

    def _step(self) -> None:
        started_ns = time.monotonic_ns()
        deltas = self._engine.step()
        steps = self._engine.stats().steps
        self._progressed = bool(deltas) or steps != self._steps_seen
        if steps != self._steps_seen:
            self._times.observe(time.monotonic_ns() - started_ns)
        self._steps_seen = steps
        self._collect(deltas)

    def _collect(self, deltas: Iterable[SequenceDelta]) -> None:
        """Sort deltas by connection; those of choices nobody waits for any more are dropped."""
        for delta in deltas:
            bit = 1 << delta.choice
            if not self._live.get(delta.key, 0) & bit:
                continue
            self._outgoing[delta.key.connection].append(to_delta(delta))
            if delta.finish is not None or delta.error is not None:
                self._close(delta.key, bit)

    def _send(self) -> None:
        for connection, deltas in self._outgoing.items():
            for data in batch_frames(self._steps_seen, deltas):
                self._switchboard.post(connection, data)
        self._outgoing.clear()
        self._switchboard.wake()

    # The way out

    def _leave(self, within_s: float) -> None:
        """Start draining; a second call can only shorten what is left."""
        self._engine.drain()
        self._state = EngineState.DRAINING
        leave_at_s = time.monotonic() + within_s
        self._leave_at_s = leave_at_s if self._leave_at_s is None else min(self._leave_at_s, leave_at_s)

    def _end_the_rest(self) -> None:
        """Tell every request that did not finish in time that it will not, arrivals included."""
        inbox = self._switchboard.inbox
        for _ in range(inbox.qsize()):
            self._apply(inbox.get())
        for key, open_choices in self._live.items():
            choices = [c for c in range(open_choices.bit_length()) if open_choices >> c & 1]
            self._outgoing[key.connection] += error_deltas(key.id, choices, ErrorCode.DRAINING)
            self._engine.cancel(key)
        self._live.clear()
        self._engine.step()  # settles the cancelled; what it returns is for nobody
        self._send()

    def _beat(self) -> None:
        stats = self._engine.stats()
        now_ns = time.monotonic_ns()
        full = self._engine.refusal(ahead=0)
        progress = {"progress_ns": now_ns} if self._progressed or not self._engine.has_work else {}
        self._page.write(
            state=self._state,
            pid=os.getpid(),
            beat_ns=now_ns,
            steps=stats.steps,
            step_ns_sum=self._times.sum_ns,
            step_p99_ns=self._times.p99_ns,
            running=stats.running,
            waiting=stats.waiting,
            in_flight=stats.in_flight,
            kv_used_blocks=stats.kv_blocks_used,
            kv_total_blocks=stats.kv_blocks_total,
            connections=self._switchboard.connections,
            channel_faults=self._switchboard.faults,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            preemptions=stats.preemptions,
            prefix_queried_tokens=stats.prefix_queried_tokens,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            accepted=stats.accepted,
            refused=stats.refused + self._switchboard.refused,
            completed=stats.completed,
            failed=stats.failed,
            cancelled=stats.cancelled,
            failed_steps=stats.failed_steps,
            full_s=0 if full is None else full.retry_after_s or 1,
            **progress,
        )
