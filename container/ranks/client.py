"""The front worker's side of the connection to the engine.

Owns: knocking, the handshake, request ids, one reader and one writer thread per connection, reconnecting.
Must not know: HTTP, text, torch, gevent (all waiting goes through the standard library, which patching
makes cooperative).
Invariant: no caller ever waits for the engine to read; when a connection ends, every waiter on it learns so,
and the next submit knocks again.

    submit -> writer's queue -> socket -> engine -> socket -> reader -> the Submission's own queue
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from array import array
from collections.abc import Iterable
from typing import Final

import msgspec

from container.engine.request import MAX_CHOICES, SamplingParams
from container.ranks.channel import FrameDecoder, FrameError
from container.ranks.door import knock
from container.ranks.messages import (
    SCHEMA_VERSION,
    Add,
    Cancel,
    Delta,
    Deltas,
    FromEngine,
    FromFront,
    Hello,
    Welcome,
    decode_from_engine,
    frame,
)
from container.ranks.submission import EngineBusy, EngineGone, EngineSilent, Submission
from container.ranks.translation import to_prompt_bytes, to_wire_sampling

READ_BYTES: Final = 64 * 1024
QUEUED_BYTES: Final = (
    32 * 1024 * 1024
)  # unsent frames of one worker; beyond that the engine is not keeping up
WELCOME_WAIT_S: Final = 5.0
JOIN_S: Final = 5.0


class _Connection:
    """One stream socket to one engine process, from knock to end; never revived."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._waiting: dict[int, Submission] = {}
        self._next_id = 1
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._unsent_bytes = 0
        self.lost = False
        self.welcome: Welcome | None = None
        self.answered = threading.Event()  # welcome is set, or lost
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer.start()
        self._reader.start()
        self._queue(Hello())

    @property
    def live(self) -> int:
        return len(self._waiting)

    def submit(self, add: Add) -> Submission:
        """Queue `add` under the next id; raises EngineGone, EngineBusy, ValueError (oversize)."""
        with self._lock:
            if self.lost:
                raise EngineGone("the engine's connection closed")
            request_id, self._next_id = self._next_id, self._next_id + 1
            submission = Submission(request_id, add.choices, self._withdraw)
            data = frame(msgspec.structs.replace(add, id=request_id))
            if self._unsent_bytes + len(data) > QUEUED_BYTES:
                raise EngineBusy(f"{self._unsent_bytes} bytes wait for the engine")
            self._waiting[request_id] = submission
            self._unsent_bytes += len(data)
        self._unsent.put(data)
        return submission

    def close(self) -> None:
        """End the connection and its threads; waiters get EngineGone."""
        with contextlib.suppress(OSError):  # the reader may have closed it already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(JOIN_S)

    def _withdraw(self, request_id: int, choice: int | None) -> None:
        if choice is not None:  # the others go on, so the request stays known
            self._queue(Cancel(request_id, choice))
            return
        with self._lock:
            known = self._waiting.pop(request_id, None)
        if known is not None:  # else it has ended: nothing to cancel
            self._queue(Cancel(request_id))

    def _queue(self, message: FromFront) -> None:
        data = frame(message)
        with self._lock:
            self._unsent_bytes += len(data)
        self._unsent.put(data)

    def _write(self) -> None:
        try:
            while (data := self._unsent.get()) is not None:
                self._socket.sendall(data)
                with self._lock:
                    self._unsent_bytes -= len(data)
        except OSError:
            self._hang_up()  # the reader then sees the end and tells the waiters

    def _read(self) -> None:
        decoder = FrameDecoder()
        try:
            while data := self._socket.recv(READ_BYTES):
                for payload in decoder.feed(data):
                    self._receive(decode_from_engine(payload))
        except (OSError, FrameError, msgspec.DecodeError):
            self._hang_up()  # a peer that breaks the schema is no engine of ours
        finally:
            self._lose()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Welcome):
            if message.schema != SCHEMA_VERSION:
                raise FrameError("the engine speaks another schema")
            self.welcome = message
            self.answered.set()
            return
        for request_id, batch in _by_request(message):
            submission = self._waiting.get(request_id)
            if submission is not None and submission.deliver(batch):
                with self._lock:
                    self._waiting.pop(request_id, None)

    def _lose(self) -> None:
        with self._lock:
            self.lost = True
            orphans = list(self._waiting.values())
            self._waiting.clear()
        for submission in orphans:
            submission.lose()
        self.answered.set()
        self._hang_up()
        self._unsent.put(None)
        self._writer.join()  # closing a descriptor that another thread still uses could hit a stranger's
        self._socket.close()


def _by_request(message: Deltas) -> Iterable[tuple[int, list[Delta]]]:
    batches: dict[int, list[Delta]] = {}
    for delta in message.deltas:
        batches.setdefault(delta.id, []).append(delta)
    return batches.items()


class EngineClient:
    """Submits requests from any thread or greenlet of one worker process. Connects when first used."""

    def __init__(self, door_fd: int) -> None:
        self._door_fd = door_fd
        self._lock = threading.Lock()
        self._connection: _Connection | None = None

    def __repr__(self) -> str:
        return f"EngineClient(live={self.live})"

    @property
    def live(self) -> int:
        """Requests submitted and neither ended nor cancelled."""
        connection = self._connection
        return 0 if connection is None else connection.live

    def welcome(self, wait_s: float = WELCOME_WAIT_S) -> Welcome:
        """Return what the engine said of itself; raises EngineSilent or EngineGone."""
        return self._welcomed(wait_s)[1]

    def submit(
        self,
        prompt: array[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        choices: int = 1,
        min_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
        tenant: str = "",
        cache_salt: str = "",
        wait_s: float = WELCOME_WAIT_S,
    ) -> Submission:
        """Send one request; its deltas come from the Submission, a refusal among them.

        `prompt` is (prompt_tokens,) of typecode "i". Raises EngineSilent, EngineGone, EngineBusy, and
        ValueError when `choices` or the prompt's size is out of bounds.
        """
        if not 1 <= choices <= MAX_CHOICES:
            raise ValueError(f"`choices` must be 1..{MAX_CHOICES}, got {choices}")
        if prompt.typecode != "i":
            raise ValueError('`prompt` must be an array of typecode "i"')
        add = Add(
            id=1,  # the connection counts
            prompt=to_prompt_bytes(prompt),
            max_tokens=max_tokens,
            sampling=to_wire_sampling(sampling),
            choices=choices,
            min_tokens=min_tokens,
            stop_token_ids=list(stop_token_ids),
            tenant=tenant,
            cache_salt=cache_salt,
        )
        return self._welcomed(wait_s)[0].submit(add)

    def close(self) -> None:
        """Leave the engine; waiters get EngineGone. A later submit would knock again."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _welcomed(self, wait_s: float) -> tuple[_Connection, Welcome]:
        connection = self._connected()
        if not connection.answered.wait(wait_s):
            raise EngineSilent(f"no answer within {wait_s} s")  # the connection stays: the answer may come
        if connection.lost or connection.welcome is None:
            raise EngineGone("the engine's connection closed")
        return connection, connection.welcome

    def _connected(self) -> _Connection:
        with self._lock:
            if self._connection is None or self._connection.lost:
                try:
                    self._connection = _Connection(knock(self._door_fd))
                except OSError as error:
                    raise EngineGone(f"cannot reach the engine: errno {error.errno}") from None
            return self._connection
