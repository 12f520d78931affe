"""One engine in one child process: JSON lines in, JSON lines out; both ends of it.

Owns: the messages and the life of the child. Must not know: which engine it is, what is measured.
Invariant: a message gets exactly one reply; what libraries print goes to stderr and never into a reply.
Standard library only: the child may run in an environment that holds nothing of ours.

    {"do": "load", "model": DIR, "options": {}} -> {"ok": true, "about": {}, "phases": {}, "roots": [pid]}
    {"do": "run", "requests": [[ids, n, at_s]]} -> {"ok": true, "answers": [{"events": [[s, n]]}]}
    {"do": "steps", "points": [[batch, context]]} -> {"ok": true, "points": [{}]}, where an engine can
    {"do": "share", "sequences": n} -> {"ok": true, "share": {}}, where an engine can
    {"do": "quit"} -> the child ends
    whatever fails -> {"ok": false, "error": "..."}
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from tests.bench.figures import Timed
from tests.bench.foreign import tree
from tests.bench.workloads import Request

ROOT = Path(__file__).parents[2]
QUIT_S = 30.0
# Every engine gets all cores and waits the way it chose to; what the shell says about that is left out.
LEFT_OUT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND")
ERROR_CHARS = 400


class Driver(Protocol):
    """What an engine's file in `drivers` implements; `run` returns times relative to its own start."""

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Make the engine ready and return `about`, `phases`, `roots`, each if there is something to tell."""

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        """Serve the requests, each at its time, greedily, with exactly the tokens asked for."""

    def close(self) -> None:
        """Leave nothing running."""


def serve(driver: Driver) -> int:
    """Answer messages on stdin until told to quit or it ends. stdout is kept for replies alone."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            message = json.loads(line)
            if message["do"] == "quit":
                break
            try:
                reply = {"ok": True, **_answer(driver, message)}
            except Exception as error:  # noqa: BLE001 - told to the parent, who decides
                traceback.print_exc()
                reply = {"ok": False, "error": f"{type(error).__name__}: {error}"[:ERROR_CHARS]}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
    finally:
        driver.close()
    return 0


def _answer(driver: Any, message: dict[str, Any]) -> dict[str, Any]:
    if message["do"] == "load":
        told = driver.load(message["model"], message["options"])
        return {"about": {}, "phases": {}, "roots": [os.getpid()], **told}
    if message["do"] == "run":
        asked = [Request(tuple(ids), tokens, at_s) for ids, tokens, at_s in message["requests"]]
        return {"answers": [{"events": t.events, "error": t.error} for t in driver.run(asked)]}
    if message["do"] == "steps":
        return {"points": driver.steps([tuple(point) for point in message["points"]])}
    if message["do"] == "share":
        return {"share": driver.share(message["sequences"])}
    raise ValueError(f"unknown message `{message['do']}`")


class EngineLost(Exception):
    """An engine's process ended, said nothing in time, or reported a failure."""


class Child:
    """The parent's end: a driver's process, its log, and the questions it is asked."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None, root: Path = ROOT
    ) -> None:
        self._log: TextIO = log.open("a", encoding="utf-8")
        self.log = log
        self.began_s = time.monotonic()
        inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        self._process = subprocess.Popen(
            list(command),
            cwd=root,
            env={**inherited, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._pending = b""
        self.roots = [self._process.pid]

    def load(self, model: Path, options: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Have the engine load and return its reply with `start_s`, from process start; raises EngineLost."""
        reply = self.ask({"do": "load", "model": str(model), "options": options}, limit_s)
        self.roots = reply["roots"]
        return {**reply, "start_s": time.monotonic() - self.began_s}

    def run(self, requests: Sequence[Request], limit_s: float) -> list[Timed]:
        """Have the engine serve `requests` and return their times; raises EngineLost."""
        asked = [[r.prompt, r.output_tokens, r.at_s] for r in requests]
        reply = self.ask({"do": "run", "requests": asked}, limit_s)
        return [
            Timed(tuple((float(s), int(n)) for s, n in answer["events"]), answer["error"])
            for answer in reply["answers"]
        ]

    def ask(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send one message and return its reply; raises EngineLost."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineLost(self._why("it ended")) from None
        reply: dict[str, Any] = json.loads(self._line(limit_s))
        if not reply["ok"]:
            raise EngineLost(reply["error"])
        return reply

    def _line(self, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        ends_s = time.monotonic() + limit_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left_s = ends_s - time.monotonic()
                if left_s <= 0 or not ready.select(left_s):
                    raise EngineLost(self._why(f"no reply within {limit_s:.0f} s"))
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise EngineLost(self._why("it ended"))
                self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _why(self, what: str) -> str:
        return f"{what}; see the end of `{self.log.name}`"

    def pause(self) -> None:
        """Stop the whole tree, so that nothing of it computes while another engine is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            for pid in tree(self._process.pid):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue  # it ended meanwhile

    def close(self) -> None:
        """Ask the child to quit; after QUIT_S end its whole tree."""
        self.resume()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already
            self._process.stdin.write(b'{"do": "quit"}\n')
            self._process.stdin.close()
        try:
            self._process.wait(QUIT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
