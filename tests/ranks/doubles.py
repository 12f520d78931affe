"""An engine with the host's view of the real one, and a host around it: what the tests of this room share.

Owns: FakeEngine, `serving` (engine, switchboard, host, page, in a thread), Raw, request shorthands.
Invariant: what `serving` starts it ends, threads and descriptors included.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from container.engine.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    Refused,
    RequestKey,
    SampledToken,
    SamplingParams,
    SequenceDelta,
)
from container.ranks import messages
from container.ranks.channel import BACKLOG_BYTES, FrameDecoder
from container.ranks.client import EngineClient
from container.ranks.door import knock, make_door
from container.ranks.heartbeat import HeartbeatReader, HeartbeatWriter, make_page
from container.ranks.host import Host
from container.ranks.messages import SCHEMA_VERSION, Add, Delta, Deltas, Hello, Welcome, frame
from container.ranks.submission import Submission
from container.ranks.switchboard import Switchboard
from container.ranks.translation import to_prompt_bytes, to_wire_sampling

WELCOME = Welcome(SCHEMA_VERSION, 4096, 1000, 8, "native", None, True, False)
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class FakeStats:
    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 64
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_queried_tokens: int = 0
    accepted: int = 0
    refused: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0


@dataclass
class FakeEngine:
    """Answers every request with its own prompt, token by token and over again, one per choice and step."""

    step_s: float = 0.0
    limit: int = 10_000  # live requests before QUEUE_FULL
    before_step: Callable[[], None] = lambda: None
    barren: bool = False  # steps run and bring nothing
    live: dict[RequestKey, EngineRequest] = field(default_factory=dict)
    made: dict[RequestKey, int] = field(default_factory=dict)
    cancels: list[RequestKey] = field(default_factory=list)
    left: dict[RequestKey, set[int]] = field(default_factory=dict)  # choices that nobody waits for
    lost: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    draining: bool = False
    counts: FakeStats = field(default_factory=FakeStats)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def refusal(self, ahead: int) -> Refused | None:
        return (
            Refused(ErrorCode.QUEUE_FULL, retry_after_s=7) if len(self.live) + ahead >= self.limit else None
        )

    def submit(self, request: EngineRequest) -> None:
        self.threads.add(threading.get_ident())
        if self.draining:
            raise Refused(ErrorCode.DRAINING)
        if not request.prompt:
            raise Refused(ErrorCode.INVALID)
        if len(self.live) >= self.limit:
            raise Refused(ErrorCode.QUEUE_FULL, retry_after_s=7)
        self.live[request.key] = request
        self.made[request.key] = 0
        self.left.pop(request.key, None)
        self.counts.accepted += 1

    def cancel(self, key: RequestKey, choice: int | None = None) -> None:
        self.threads.add(threading.get_ident())
        self.cancels.append(key)
        if choice is not None:
            self.left.setdefault(key, set()).add(choice)
            if len(self.left[key]) < self.live[key].choices:
                return
        self.counts.cancelled += self.live.pop(key, None) is not None

    def cancel_connection(self, connection: int) -> None:
        self.lost.append(connection)
        for key in [k for k in self.live if k.connection == connection]:
            self.cancel(key)

    def step(self) -> list[SequenceDelta]:
        self.threads.add(threading.get_ident())
        self.before_step()
        time.sleep(self.step_s)
        if self.barren or not self.live:
            return []
        self.counts.steps += 1
        return [delta for key in list(self.live) for delta in self._grow(key)]

    def _grow(self, key: RequestKey) -> Iterator[SequenceDelta]:
        request = self.live[key]
        made, self.made[key] = self.made[key], self.made[key] + 1
        last = made + 1 >= request.max_tokens
        for choice in set(range(request.choices)) - self.left.get(key, set()):
            token = SampledToken(request.prompt[made % len(request.prompt)])
            finish = FinishReason.LENGTH if last else None
            yield SequenceDelta(key, choice, (token,), finish=finish, cached_tokens=0 if made == 0 else None)
        if last:
            del self.live[key]
            self.counts.completed += 1

    def drain(self) -> None:
        self.draining = True

    def stats(self) -> FakeStats:
        self.counts.running = self.counts.in_flight = len(self.live)
        return self.counts


@dataclass
class Serving:
    """A running host and the ways in."""

    engine: FakeEngine
    host: Host
    switchboard: Switchboard
    door_fd: int  # the front's end
    engine_door_fd: int
    page: HeartbeatReader
    thread: threading.Thread
    failures: list[BaseException]

    def client(self) -> EngineClient:
        return EngineClient(self.door_fd)


@contextmanager
def serving(
    engine: FakeEngine | None = None,
    *,
    door: tuple[int, int] | None = None,
    drain_s: float = 5.0,
    backlog_bytes: int = BACKLOG_BYTES,
) -> Iterator[Serving]:
    """Run a host over `engine` until the block ends; `door`, when given, stays open."""
    engine = engine or FakeEngine()
    front_fd, engine_fd = door or make_door()
    page_fd = make_page()
    writer, reader = HeartbeatWriter(page_fd), HeartbeatReader(page_fd)
    switchboard = Switchboard(engine_fd, WELCOME, refusal=engine.refusal, backlog_bytes=backlog_bytes)
    host = Host(engine, switchboard, writer, drain_s=drain_s)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            host.run()
        except Exception as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    thread = threading.Thread(target=run, name="host")
    thread.start()
    try:
        yield Serving(engine, host, switchboard, front_fd, engine_fd, reader, thread, failures)
    finally:
        host.request_stop()
        thread.join(10.0)
        assert not thread.is_alive(), "the host did not leave"
        writer.close()
        reader.close()
        os.close(page_fd)
        if door is None:
            os.close(front_fd)
            os.close(engine_fd)


def submit(client: EngineClient, tokens: list[int], max_tokens: int = 4, choices: int = 1) -> Submission:
    return client.submit(array("i", tokens), max_tokens=max_tokens, sampling=GREEDY, choices=choices)


def collect(submission: Submission, silence_s: float = 5.0) -> list[Delta]:
    return [delta for batch in submission.batches(silence_s) for delta in batch]


def tokens_of(deltas: list[Delta], choice: int = 0) -> list[int]:
    return [token.token for delta in deltas if delta.choice == choice for token in delta.tokens]


def add(request_id: int, tokens: list[int], max_tokens: int = 4, **changes: object) -> Add:
    values: dict[str, object] = {
        "id": request_id,
        "prompt": to_prompt_bytes(array("i", tokens)),
        "max_tokens": max_tokens,
        "sampling": to_wire_sampling(GREEDY),
        "choices": 1,
        "min_tokens": 0,
        "stop_token_ids": [],
        "tenant": "",
        "cache_salt": "",
    }
    return Add(**values | changes)  # type: ignore[arg-type]


def wait_until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.005)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Raw:
    """A front that says exactly what it is told to."""

    def __init__(self, serving: Serving, hello: bool = True) -> None:
        self.socket = knock(serving.door_fd)
        self.socket.settimeout(5.0)
        self._decoder = FrameDecoder()
        self._frames: list[messages.FromEngine] = []
        if hello:
            self.send(Hello())
            assert self.receive() == WELCOME

    def send(self, *messages_: messages.FromFront) -> None:
        self.socket.sendall(b"".join(frame(m) for m in messages_))

    def receive(self) -> messages.FromEngine | None:
        """Return the next message, or None at the end."""
        while not self._frames:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames += [messages.decode_from_engine(p) for p in self._decoder.feed(data)]
        return self._frames.pop(0)

    def deltas(self, ended: int) -> list[Delta]:
        """Return deltas until `ended` final ones have come."""
        out: list[Delta] = []
        while sum(d.finish is not None or d.error is not None for d in out) < ended:
            message = self.receive()
            assert isinstance(message, Deltas)
            out += message.deltas
        return out

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
