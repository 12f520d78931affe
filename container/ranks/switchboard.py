"""The engine's IO thread: front connections in and out, so that the main loop never touches a socket.

Owns: the selector, the door, the channels, their handshake, both queues between the threads.
Must not know: the scheduler, steps, the model beyond the Welcome it repeats. No torch.
Invariant: whatever a peer sends, the thread goes on; what the main loop takes from `inbox` is in the order of
arrival per connection, and Lost is the last item of a connection.

    worker ==socket== Channel -> inbox (Arrival | Cancellation | Lost | Signal) -> main loop
                            ^--- outbox (connection, frame), woken by an eventfd <---/
"""

from __future__ import annotations

import enum
import os
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from container.engine.request import MAX_CHOICES, EngineRequest, Refused, RequestKey
from container.ranks.channel import BACKLOG_BYTES, Channel, Fault
from container.ranks.door import DoorClosed, answer
from container.ranks.messages import (
    SCHEMA_VERSION,
    Add,
    Cancel,
    Delta,
    Deltas,
    FromFront,
    Hello,
    Welcome,
    frame,
)
from container.ranks.translation import error_deltas, to_request

MAX_CONNECTIONS: Final = 64  # front workers, with room for their restarts
FLUSH_S: Final = 2.0  # how long the last frames may take to leave on the way out


@dataclass(frozen=True, slots=True)
class Arrival:
    """A well-formed request; `frame_bytes` go back by `applied` once it is with the engine."""

    request: EngineRequest = field(repr=False)
    frame_bytes: int


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Nobody waits for a request, or for one choice of it."""

    key: RequestKey
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A connection has ended; nobody waits for its requests."""

    connection: int


class Signal(enum.Enum):
    """What reaches the main loop beside traffic."""

    DRAIN = "drain"  # finish what runs, refuse the rest
    STOP = "stop"  # end what runs with an error and leave
    IO_FAILED = "io_failed"  # the IO thread died: a bug, and the end of this process


Item = Arrival | Cancellation | Lost | Signal


class Switchboard:
    """Runs the IO thread from `start` to `close`. `inbox` is safe to fill from a signal handler."""

    def __init__(
        self,
        door_fd: int,
        welcome: Welcome,
        *,
        refusal: Callable[[int], Refused | None] = lambda _: None,
        backlog_bytes: int = BACKLOG_BYTES,
    ) -> None:
        self._refusal = refusal
        self._added = 0  # choices put into the inbox; written by the IO thread
        self._taken = 0  # choices the main loop has applied; written by it
        self.refused = 0  # requests answered QUEUE_FULL here
        self.inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._door_fd = door_fd
        self._welcome = frame(welcome)
        self._backlog_bytes = backlog_bytes
        self._outbox: deque[tuple[int, bytes | int]] = deque()
        self._channels: dict[int, Channel] = {}
        self._interest: dict[int, int] = {}  # connection -> selector events registered
        self._next_number = 1  # 0 is the engine's own (warm-up)
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)
        self.faults = 0  # connections closed for a broken rule

    @property
    def connections(self) -> int:
        return len(self._channels)

    def start(self) -> None:
        self._thread.start()

    # Called by the main loop

    def post(self, connection: int, data: bytes) -> None:
        """Send one frame; dropped when the connection is gone. Leaves with the next `wake`."""
        self._outbox.append((connection, data))

    def applied(self, arrival: Arrival) -> None:
        """Give back room taken by an Arrival, so that a paused connection is read again."""
        self._taken += arrival.request.choices
        self._outbox.append((arrival.request.key.connection, arrival.frame_bytes))

    def wake(self) -> None:
        """Have the IO thread act on what was posted."""
        if self._outbox or self._closing:
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Flush what is posted, within FLUSH_S, and end the thread; idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._thread.ident is not None:
            self.wake()
            self._thread.join()
        os.close(self._wake_fd)

    # The thread

    def _run(self) -> None:
        try:
            self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
            self._selector.register(self._door_fd, selectors.EVENT_READ, None)
            while not self._closing:
                self._turn(timeout_s=None)
            self._flush(time.monotonic() + FLUSH_S)
        except BaseException:
            self.inbox.put(Signal.IO_FAILED)
            raise
        finally:
            for channel in self._channels.values():
                channel.close(Fault.CLOSED)
            self._selector.close()

    def _turn(self, timeout_s: float | None) -> None:
        for key, events in self._selector.select(timeout_s):
            if isinstance(key.data, Channel):
                self._serve(key.data, events)
            elif key.fd == self._wake_fd:
                self._deliver()
            else:
                self._open_door()

    def _flush(self, deadline_s: float) -> None:
        self._deliver(wait=False)
        while any(c.wants_write for c in self._channels.values()) and time.monotonic() < deadline_s:
            for key, events in self._selector.select(deadline_s - time.monotonic()):
                if isinstance(key.data, Channel) and events & selectors.EVENT_WRITE:
                    key.data.flush()
                    self._settle(key.data)

    def _open_door(self) -> None:
        try:
            adopted = answer(self._door_fd)
        except DoorClosed:
            self._selector.unregister(self._door_fd)
            self.inbox.put(Signal.DRAIN)  # supervisor and workers are gone: nobody can come any more
            return
        for connection in adopted:
            self._adopt(connection)

    def _adopt(self, connection: socket.socket) -> None:
        if len(self._channels) >= MAX_CONNECTIONS:
            connection.close()
            return
        channel = Channel(connection, self._next_number, backlog_bytes=self._backlog_bytes)
        self._next_number += 1
        self._channels[channel.number] = channel
        self._settle(channel)

    def _serve(self, channel: Channel, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            channel.flush()
        if events & selectors.EVENT_READ:
            for message, size_bytes in channel.read():
                if channel.fault is None:
                    self._receive(channel, message, size_bytes)
        self._settle(channel)

    def _receive(self, channel: Channel, message: FromFront, size_bytes: int) -> None:
        if isinstance(message, Hello):
            if channel.greeted or message.schema != SCHEMA_VERSION:
                channel.close(Fault.PROTOCOL)
                return
            channel.greeted = True
            channel.send(self._welcome)
        elif not channel.greeted:
            channel.close(Fault.PROTOCOL)
        elif isinstance(message, Cancel):
            self.inbox.put(Cancellation(RequestKey(channel.number, message.id), message.choice))
        else:
            self._add(channel, message, size_bytes)

    def _add(self, channel: Channel, add: Add, size_bytes: int) -> None:
        try:
            request = to_request(add, channel.number)
        except Refused as refused:
            self._send_refusal(channel, add, refused)
            return
        # The main loop looks at arrivals between steps only; in an overload that is too late to say no.
        full = self._refusal(self._added - self._taken)
        if full is not None:
            self.refused += 1
            self._send_refusal(channel, add, full)
            return
        self._added += request.choices
        channel.intake_bytes += size_bytes
        self.inbox.put(Arrival(request, size_bytes))

    def _send_refusal(self, channel: Channel, add: Add, refused: Refused) -> None:
        choices = range(min(max(add.choices, 1), MAX_CHOICES))
        deltas = error_deltas(add.id, choices, refused.code, retry_after_s=refused.retry_after_s)
        channel.send(frame(Deltas(0, deltas)))

    def _deliver(self, *, wait: bool = True) -> None:
        if wait:
            os.eventfd_read(self._wake_fd)
        touched: dict[int, Channel] = {}
        while self._outbox:
            number, what = self._outbox.popleft()
            channel = self._channels.get(number)
            if channel is None:
                continue  # gone meanwhile; its requests have been told so
            touched[number] = channel
            if isinstance(what, bytes):
                channel.send(what)
            else:
                channel.intake_bytes -= what
        for channel in touched.values():
            self._settle(channel)

    def _settle(self, channel: Channel) -> None:
        """Bring the selector in line with what the channel wants, or take leave of it."""
        number = channel.number
        if channel.fault is not None:
            if self._channels.pop(number, None) is None:
                return
            if self._interest.pop(number, 0):
                self._selector.unregister(channel.socket)
            self.faults += channel.fault not in (Fault.LEFT, Fault.CLOSED)
            self.inbox.put(Lost(number))
            return
        wanted = channel.wants_read * selectors.EVENT_READ | channel.wants_write * selectors.EVENT_WRITE
        registered = self._interest.get(number, 0)
        if wanted == registered:
            return
        if not registered:
            self._selector.register(channel.socket, wanted, channel)
        elif not wanted:
            self._selector.unregister(channel.socket)
        else:
            self._selector.modify(channel.socket, wanted, channel)
        self._interest[number] = wanted


def batch_frames(step: int, deltas: list[Delta]) -> Iterable[bytes]:
    """Yield one frame with all `deltas`, or as many as their size needs.

    Raises ValueError when a single delta exceeds a frame; translation's bounds exclude that.
    """
    try:
        yield frame(Deltas(step, deltas))
    except ValueError:
        if len(deltas) == 1:
            raise
        middle = len(deltas) // 2
        yield from batch_frames(step, deltas[:middle])
        yield from batch_frames(step, deltas[middle:])
