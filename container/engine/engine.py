"""Requests in, deltas out: the one object that whoever owns the process talks to.

Owns: live requests and how each ends, the step loop's body, what happens when a step fails, the counters.
Must not know: sockets, text, tensors, threads. Standard library only.
Invariant: an accepted request yields exactly one final delta per choice, unless its connection is gone, and
leaves no block and no slot behind.

    submit -> Scheduler.plan -> Runner.run -> Scheduler.commit -> deltas
    cancel ---^                     | raises: fail the requests of that step, reset, recompute the rest
              on a device: launch, and collect in the next call, behind the next launch (see `ahead`)

One thread calls everything here but `refusal`; arrivals and cancels take effect between steps.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from container.engine.admission import EngineLimits, Gate
from container.engine.ahead import Ahead
from container.engine.grammar import Aside, Grammars, GrammarState
from container.engine.live import Live
from container.engine.outcome import match
from container.engine.planning import Step
from container.engine.prefix import PrefixNames
from container.engine.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    Refused,
    RequestKey,
    SampledToken,
    SequenceDelta,
)
from container.engine.scheduler import Scheduler
from container.engine.sequence import Sequence, State
from container.engine.stats import Counters, Stats
from container.engine.step import Capacity, RowResult, Runner, StepResult

__all__ = ["Engine", "EngineLimits", "Stats"]

_log = logging.getLogger("strongroom.engine")


class Engine:
    """Serves requests on one runner.

    `clock` returns monotonic seconds. `boot_key` salts the prefix cache and is drawn when not given;
    `model_identity` names weights and quantization. `grammars` is needed by runners that can hold sampling to
    a grammar. Raises ValueError on limits the runner cannot keep.
    """

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        boot_key: bytes | None = None,
        model_identity: bytes = b"",
        grammars: Grammars | None = None,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._capacity = runner.capacity()
        if grammars is None:
            self._capacity = replace(self._capacity, grammar=False)
        self._ahead = Ahead(runner) if self._capacity.runs_ahead else None
        self._grammars = grammars
        self._aside = Aside()
        self._gate = Gate(self._capacity, limits or EngineLimits())
        self._names = PrefixNames(boot_key or secrets.token_bytes(32), model_identity)
        self._scheduler = Scheduler(self._capacity, self._gate.running_limit)
        self._live: dict[RequestKey, Live] = {}
        self._load = (0, 0)  # sequences running and waiting, for `refusal`
        self._pending: list[SequenceDelta] = []  # endings that happened between steps
        self._counters = Counters()
        self._serial = 0
        self._step_number = 0
        self._draining = False

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def running_limit(self) -> int:
        return self._gate.running_limit

    @property
    def has_work(self) -> bool:
        """True while `step` has something to run or to report."""
        return bool(self._live or self._pending or self._under_way)

    # Arrivals and departures

    def submit(self, request: EngineRequest) -> None:
        """Accept `request`, or raise Refused and keep nothing of it."""
        try:
            if self._draining:
                raise Refused(ErrorCode.DRAINING)
            self._gate.check_request(request)
            if request.key in self._live:
                raise Refused(ErrorCode.INVALID)
            self._gate.check_room(len(self._scheduler.running), self._waiting)
        except Refused:
            self._counters.refused += 1
            raise
        root = self._names.root(request.tenant, request.cache_salt)
        choices = [
            Sequence.of(request, choice, self._serial + choice, root) for choice in range(request.choices)
        ]
        self._serial += request.choices
        live = self._live[request.key] = Live(open=choices)
        grammar = request.sampling.grammar
        if grammar is not None and self._grammars is not None:
            live.compilation = self._grammars.prepare(grammar)
        if live.compilation is None or live.compilation.state is GrammarState.READY:
            self._scheduler.add(list(choices))
        else:
            self._aside.put(list(choices), live.compilation)
        self._counters.accepted += 1
        self._counters.prompt_tokens += len(request.prompt)
        self._note_load()

    def refusal(self, ahead: int) -> Refused | None:
        """Return what `submit` would raise for want of room with `ahead` more sequences before it, else None.

        Any thread may ask while a step runs, so that the surplus of an overload need not wait for its end.
        The answer rests on the counts as of the last step; `submit` has the last word.
        """
        running, waiting = self._load
        try:
            self._gate.check_room(running, waiting + ahead)
        except Refused as refused:
            return refused
        return None

    def cancel(self, key: RequestKey, choice: int | None = None) -> None:
        """End a request, or one choice of it, that nobody waits for; unknown and ended ones are no error.

        The final deltas come with the next `step`. The request counts as cancelled when nothing of it is left
        running, else as its other choices end.
        """
        live = self._live.get(key)
        if live is None:
            return
        leaving = [sequence for sequence in live.open if choice is None or sequence.choice == choice]
        live.cancelled = len(leaving) == len(live.open)
        for sequence in leaving:
            self._pending.append(self._end(sequence, finish=FinishReason.CANCELLED))

    def cancel_connection(self, connection: int) -> None:
        """End every request of a connection that is gone; no more deltas name it."""
        for key in [key for key in self._live if key.connection == connection]:
            self.cancel(key)
        self._pending = [delta for delta in self._pending if delta.key.connection != connection]

    def drain(self) -> None:
        """Refuse new requests from now on; call `step` until `has_work` is False to finish the accepted."""
        self._draining = True

    def forget_history(self) -> None:
        """Count from zero: what was done so far was a warm-up, nobody's request. Only without work."""
        assert not self.has_work, "history is forgotten between requests only"
        self._counters = Counters()
        self._scheduler.forget_counts()
        self._gate.forget_pace()

    # The step

    def step(self) -> list[SequenceDelta]:
        """Run one step and return what it added; returns [] and runs nothing when there is nothing to do.

        A runner that raises costs the requests of that step; if its `reset` raises too, so does this. On a
        runner that runs ahead this begins one step and returns what the one before it added.
        """
        deltas, self._pending = self._pending, []
        deltas.extend(self._settle_grammars())
        started_s = self._clock()
        step = self._scheduler.plan(self._step_number + 1)
        for sequence in self._scheduler.take_exhausted():
            deltas.extend(self._fail_request(sequence.key, ErrorCode.KV_EXHAUSTED))
        if step is None and not self._under_way:
            return deltas
        generated = self._counters.generated_tokens
        full = self._scheduler.full
        if step is not None:
            self._step_number += 1
            self._counters.steps += 1
        if self._ahead is not None:
            deltas.extend(self._overlap(self._ahead, step))
        elif step is not None:
            self._scheduler.advance(step)
            deltas.extend(self._take(step, partial(self._runner.run, step.plan)))
        self._counters.last_step_s = self._clock() - started_s
        # Steps that compute prompts say nothing about others.
        if step is not None and all(count == 1 for _, count in step.rows):
            self._scheduler.speculation.costs.observe(len(step.plan.tokens), self._counters.last_step_s)
        if full:
            self._gate.pace.observe(self._counters.generated_tokens - generated, self._counters.last_step_s)
        self._note_load()
        return deltas

    def _overlap(self, ahead: Ahead, step: Step | None) -> list[SequenceDelta]:
        """Launch `step`, take in the one before it, which ran meanwhile, and leave `step` under way."""
        before, launched, failure = ahead.turn(), None, None
        try:
            launched = None if step is None else ahead.launch(step)
        except Exception as error:  # noqa: BLE001 - as in `_take`; what ran before it has not failed
            failure = error
        deltas: list[SequenceDelta] = []
        if before is not None:
            faults = self._counters.failed_steps
            deltas.extend(self._take(before.step, before.collect))
            if self._counters.failed_steps > faults:
                return deltas  # the runner has forgotten what was launched behind it: it is planned again
        if step is not None and failure is not None:
            deltas.extend(self._fail_step(step, failure))
        if launched is not None:
            self._scheduler.advance(launched.step)
            if launched.ticket.ready:
                return deltas + self._take(launched.step, launched.collect)
            ahead.leave(launched)
        return deltas

    def _take(self, step: Step, result: Callable[[], StepResult]) -> list[SequenceDelta]:
        """Account for what a step gave."""
        try:
            outcome = match(step, result(), self._capacity.vocabulary)
        except Exception as error:  # noqa: BLE001 - whatever the device throws, the engine goes on
            return self._fail_step(step, error)
        return self._apply(step, outcome)

    def _settle_grammars(self) -> list[SequenceDelta]:
        """Queue what waited for a grammar that is ready now; end what waited for one that failed."""
        ready, failed = self._aside.settle()
        for choices in ready:
            self._scheduler.add(choices)
        return [delta for key in failed for delta in self._fail_request(key, ErrorCode.GRAMMAR)]

    @property
    def _under_way(self) -> bool:
        return self._ahead is not None and self._ahead.under_way is not None

    @property
    def _waiting(self) -> int:
        return self._scheduler.waiting + len(self._aside)

    def _note_load(self) -> None:
        self._load = (len(self._scheduler.running), self._waiting)  # one store: never half seen

    def stats(self) -> Stats:
        """Return the present counts."""
        scheduler = self._scheduler
        return Stats(
            waiting=self._waiting,
            running=len(scheduler.running),
            in_flight=len(self._live),
            kv_blocks_used=scheduler.pool.used,
            kv_blocks_total=scheduler.pool.blocks,
            preemptions=scheduler.preemptions,
            prefix_hit_tokens=scheduler.hit_tokens,
            prefix_queried_tokens=scheduler.queried_tokens,
            draining=self._draining,
            **asdict(self._counters),
        )

    def check(self) -> None:
        """Raise AssertionError unless all invariants hold; for tests and debugging, between steps."""
        self._scheduler.check()
        counters = self._counters
        ended = counters.completed + counters.failed + counters.cancelled
        assert counters.accepted == ended + len(self._live), "a request is lost or counted twice"
        sequences = [sequence for live in self._live.values() for sequence in live.open]
        states = [sequence.state for sequence in sequences]
        assert State.FINISHED not in states and State.NEW not in states, "a live sequence is not queued"
        assert states.count(State.RUNNING) == len(self._scheduler.running), "a sequence runs for nobody"
        assert len(states) == len(self._scheduler.running) + self._waiting, "a sequence is lost"
        assert states.count(State.ASIDE) == len(self._aside), "a sequence waits for no grammar"
        assert all(live.open for live in self._live.values()), "a request without choices is not ended"

    # What a step brought

    def _apply(self, step: Step, outcome: dict[Sequence, RowResult]) -> list[SequenceDelta]:
        deltas: list[SequenceDelta] = []
        failed = {sequence: row for sequence, row in outcome.items() if row.failed}
        accepted = {s: len(outcome[s].accepted) for s in step.drafts if s in outcome}
        self._scheduler.commit(step, failed, accepted)
        self._counters.draft_tokens += sum(map(len, step.drafts.values()))
        self._counters.accepted_tokens += sum(accepted.values())
        for sequence in outcome:
            sequence.receive()
        for sequence, row in failed.items():
            code = ErrorCode.GRAMMAR if row.grammar_failed else ErrorCode.NUMERICAL
            deltas.extend(self._fail_request(sequence.key, code))
        for sequence, row in outcome.items():
            if sequence.state is State.FINISHED:
                continue  # failed, or a sibling did
            sequence.prompt_logprobs.extend(row.prompt_logprobs)
            if row.sampled is not None:
                deltas.append(self._grow(sequence, (*row.accepted, row.sampled), row.ended))
        return deltas

    def _grow(self, sequence: Sequence, sampled: tuple[SampledToken, ...], ended: bool) -> SequenceDelta:
        """Append what was sampled, up to the token that ends the sequence; `ended` is said of the last."""
        for made, token in enumerate(sampled, start=1):
            finish = self._finish(sequence, token.token, ended and made == len(sampled))
            sequence.history.append(token.token)
            if finish is not None:
                break
        self._counters.generated_tokens += made
        if finish is not None:
            return self._end(sequence, tokens=sampled[:made], finish=finish)
        return self._delta(sequence, tokens=sampled)

    def _finish(self, sequence: Sequence, token: int, ended: bool) -> FinishReason | None:
        """Return how `token`, the sequence's next, ends it, if it does."""
        request, before = sequence.request, sequence.generated
        if before >= request.min_tokens and token in request.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if ended:  # whatever `min_tokens` says: there is nothing left that may be drawn
            return FinishReason.GRAMMAR
        if before + 1 >= request.max_tokens:  # the window holds these: see Gate.check_request
            return FinishReason.LENGTH
        return None

    def _fail_step(self, step: Step, error: Exception) -> list[SequenceDelta]:
        # The type alone: an exception's text may quote what was computed.
        _log.error("step %d failed: %s", step.plan.number, type(error).__name__)
        self._counters.failed_steps += 1
        deltas: list[SequenceDelta] = []
        for key in dict.fromkeys(sequence.key for sequence, _ in step.rows):
            deltas.extend(self._fail_request(key, ErrorCode.INTERNAL))
        self._runner.reset()
        self._scheduler.reset()
        return deltas

    # Endings

    def _fail_request(self, key: RequestKey, code: ErrorCode) -> list[SequenceDelta]:
        """End all open choices of a request; one failed choice fails it whole."""
        live = self._live.get(key)
        if live is None:
            return []  # a sibling's failure has ended it
        live.failed = True
        return [self._end(sequence, error=code) for sequence in list(live.open)]

    def _end(
        self,
        sequence: Sequence,
        *,
        tokens: tuple[SampledToken, ...] = (),
        finish: FinishReason | None = None,
        error: ErrorCode | None = None,
    ) -> SequenceDelta:
        """Finish one choice and return its final delta; the last one ends the request."""
        sequence.receive()  # what is under way is for nobody
        delta = self._delta(sequence, tokens, finish, error)
        if sequence.state is State.RUNNING:  # who only waited leaves no place behind
            self._gate.pace.answered(sequence.generated)
        if sequence.state is State.ASIDE:
            self._aside.discard(sequence)
        elif sequence.state is not State.FINISHED:  # the scheduler itself finishes what is exhausted
            self._scheduler.remove(sequence)
        live = self._live[sequence.key]
        live.open.remove(sequence)
        if not live.open:
            del self._live[sequence.key]
            if live.compilation is not None:
                live.compilation.release()
            self._counters.failed += live.failed
            self._counters.cancelled += live.cancelled and not live.failed
            self._counters.completed += not (live.failed or live.cancelled)
        return delta

    def _delta(
        self,
        sequence: Sequence,
        tokens: tuple[SampledToken, ...] = (),
        finish: FinishReason | None = None,
        error: ErrorCode | None = None,
    ) -> SequenceDelta:
        first = bool(tokens) and sequence.generated == 1
        logprobs = first and sequence.sampling.prompt_logprobs is not None
        return SequenceDelta(
            key=sequence.key,
            choice=sequence.choice,
            tokens=tokens,
            finish=finish,
            error=error,
            cached_tokens=sequence.cached_tokens if first else None,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if logprobs else None,
        )
