"""Grammars checked before the engine hears of them, in a process that may die.

Owns: the child process and its replacement, the deadlines, the memory of what was checked before.
Must not know: HTTP, the engine, how grammars are built (container.text.grammar_child does).
Invariant: a call ends within its deadline whatever the grammar does; a fork that missed it is dead by its own
alarm, and no other request notices.

Only `socket` and `threading` block here, so a process patched by gevent waits without stopping its other
requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from container.text.child import Child, exchange
from container.text.grammar_errors import GrammarError, GrammarReason

BUILD_S: Final = 0.8  # wall clock of a check: the client has its answer within 1 s
JUDGE_S: Final = 10.0  # wall clock of judging a finished text; up to 1 ms per token
START_S: Final = 30.0  # a tokenizer of 262,144 tokens takes 8.5 s to build on a free core
GRACE_S: Final = 0.1  # past the fork's own alarm
PARALLEL: Final = 4  # forks at once; one that explodes must not hold up the rest
QUEUE_S: Final = 1.0  # wait for a place among them before a check ...
JUDGE_QUEUE_S: Final = 10.0  # ... and before a finished answer is judged: the work is done, it may wait
REMEMBERED: Final = 1024  # results; about 200 bytes each
# Results that the machine's state may have caused: the next request tries again.
_PASSING: Final = frozenset({GrammarReason.TIME, GrammarReason.RESOURCES, GrammarReason.BUSY})

_Result = tuple[GrammarReason, str | None] | None


class GrammarChecker:
    """Checks grammars over one model's tokenizer. Safe to call from many threads."""

    def __init__(
        self, tokenizer: bytes, end_ids: Iterable[int], *, build_s: float = BUILD_S, judge_s: float = JUDGE_S
    ) -> None:
        """`tokenizer` is tokenizer.json. Starts nothing."""
        self._file = os.memfd_create("tokenizer", os.MFD_CLOEXEC)
        with open(self._file, "wb", closefd=False) as file:
            file.write(tokenizer)
        self._build_s = build_s
        self._judge_s = judge_s
        self._setup = json.dumps({"end_ids": sorted(end_ids)}).encode()
        self._lock = threading.Lock()  # round starting, replacing and talking to the child
        self._child: Child | None = None
        self._unreadable = False
        self._closed = False
        self._free = threading.BoundedSemaphore(PARALLEL)
        self._known: OrderedDict[bytes, _Result] = OrderedDict()

    def start(self) -> None:
        """Start the child ahead of the first request; raises GrammarError(UNAVAILABLE)."""
        with self._lock:
            self._live_child()

    def check(self, kind: str, text: str) -> None:
        """Raise GrammarError when the grammar cannot be followed; ends within QUEUE_S + BUILD_S + GRACE_S.

        The child's start, once per process or after its death, comes on top.
        """
        key = hashlib.sha256(f"{kind}\0{text}".encode()).digest()
        if key in self._known:
            result = self._known[key]
            with contextlib.suppress(KeyError):  # another thread may have dropped it since
                self._known.move_to_end(key)
        else:
            reply = self._ask({"kind": kind, "text": text}, QUEUE_S, self._build_s)
            result = (GrammarReason(reply["reason"]), reply.get("keyword")) if "reason" in reply else None
            if result is None or result[0] not in _PASSING:
                self._remember(key, result)
        if result is not None:
            raise GrammarError(*result)

    def holds(self, kind: str, text: str, answer: str) -> bool:
        """Return True when `answer` follows the grammar to its end; raises GrammarError if untold."""
        request = {"kind": kind, "text": text, "answer": answer}
        reply = self._ask(request, JUDGE_QUEUE_S, self._judge_s)
        if "reason" in reply:
            raise GrammarError(GrammarReason(reply["reason"]))
        return reply.get("holds") is True

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when it is not running."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the child. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._file)
            if self._child is not None:
                self._child.end()
                self._child = None

    def _remember(self, key: bytes, result: _Result) -> None:
        self._known[key] = result
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _ask(self, request: dict[str, Any], queue_s: float, limit_s: float) -> dict[str, Any]:
        """Return the reply of a fork; its death or silence is a reply too."""
        payload = json.dumps(request | {"limit_s": limit_s}).encode()
        if not self._free.acquire(timeout=queue_s):
            return {"reason": GrammarReason.BUSY}
        reply = None
        try:
            with self._fork() as channel:
                started_s = time.monotonic()
                with contextlib.suppress(OSError, ValueError):  # a timeout included
                    reply = exchange(channel, payload, limit_s + GRACE_S)
        finally:
            self._free.release()
        if reply is not None:
            return reply
        late = time.monotonic() - started_s >= limit_s
        return {"reason": GrammarReason.TIME if late else GrammarReason.RESOURCES}

    def _fork(self) -> socket.socket:
        """Return a socket that a new fork of the child serves."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                with self._lock:
                    socket.send_fds(self._live_child().socket, [b"+"], [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return ours

    def _live_child(self) -> Child:
        if self._child is not None and self._child.alive:
            return self._child
        if self._unreadable or self._closed:
            raise GrammarError(GrammarReason.UNAVAILABLE)
        if self._child is not None:
            self._child.end()
        started = Child("container.text.grammar_child", self._file)
        reply = None
        try:
            with contextlib.suppress(OSError, ValueError):  # a timeout included
                reply = exchange(started.socket, self._setup, START_S)
        finally:
            if reply is None or "reason" in reply:
                started.end()
        if reply is None or "reason" in reply:
            self._unreadable = reply is not None  # a child that only died may do better next time
            raise GrammarError(GrammarReason.UNAVAILABLE)
        started.socket.settimeout(START_S)
        self._child = started
        return started
