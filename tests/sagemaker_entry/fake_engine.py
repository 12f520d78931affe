"""An engine process for tests of the front: real door, frames and heartbeat; the tokens are made up.

It answers with the prompt's own tokens, over and over. Words in the prompt steer it:

    wait=50      milliseconds between tokens         eos=3     end of sequence after 3 tokens
    error=CODE   an error delta ...                  at=2      ... after 2 tokens
    die=2        the process ends after 2 tokens     full=1    refused: queue full, retry after 7 s
    crowd=9      while this lasts the page says there is no room, retry after 9 s
    say=HEX      these tokens, four digits each, then end of sequence, instead of the prompt's
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import time
from array import array
from pathlib import Path

from container.ranks import config, door, heartbeat, lockdown
from container.ranks.channel import Channel
from container.ranks.messages import Add, Cancel, Delta, Deltas, Hello, Token, Welcome, frame

EOS = 257
SEQUENCE_TOKENS = 4096


class FakeRequest:
    """One Add and how far it is."""

    def __init__(self, channel: Channel, add: Add) -> None:
        self.channel = channel
        self.add = add
        self.prompt = list(array("i", add.prompt))
        text = bytes(token for token in self.prompt if token < 256).decode("latin-1")
        self.words = dict(re.findall(r"(\w+)=(\w+)", text))
        digits = self.words.get("say", "")
        self.script = [int(digits[i : i + 4], 16) for i in range(0, len(digits), 4)]
        self.made = 0
        self.open = list(range(add.choices))
        self.due_s = time.monotonic()

    def number(self, word: str, default: int) -> int:
        return int(self.words.get(word, default))

    def step(self) -> tuple[list[Delta], bool]:
        """Return the next delta of every choice and whether that was the last."""
        if "die" in self.words and self.made >= self.number("die", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if "error" in self.words and self.made >= self.number("at", 0):
            return [self._delta(choice, [], error=self.words["error"]) for choice in self._choices()], True
        if "full" in self.words:
            return [self._delta(c, [], error="queue_full", retry_after_s=7) for c in self._choices()], True
        ends = "eos" in self.words and self.made == self.number("eos", 0) and EOS in self.add.stop_token_ids
        if self.script:
            ends = self.made == len(self.script)
        source = self.script or self.prompt
        token = EOS if ends else source[self.made % len(source)]
        self.made += 1
        self.due_s += self.number("wait", 0) / 1000
        full = self.made >= self.add.max_tokens
        finish = "stop_token" if ends else "length" if full else None
        return [self._delta(c, [token], finish=finish) for c in self._choices()], finish is not None

    def leave(self, choice: int | None) -> None:
        """Make nothing more for one choice, or for all."""
        self.open = [] if choice is None else [c for c in self.open if c != choice]

    def _choices(self) -> list[int]:
        return self.open

    def _delta(
        self,
        choice: int,
        tokens: list[int],
        finish: str | None = None,
        error: str | None = None,
        retry_after_s: int | None = None,
    ) -> Delta:
        top = self.add.sampling.top_logprobs
        made = [
            Token(token, None if top is None else -0.5, [] if not top else [(token, -0.5)])
            for token in tokens
        ]
        first = self.made <= 1
        wanted = self.add.sampling.prompt_logprobs is not None and first
        return Delta(
            id=self.add.id,
            choice=choice,
            tokens=made,
            finish=finish,
            error=error,
            retry_after_s=retry_after_s,
            cached_tokens=0 if first else None,
            prompt_logprobs=[Token(token, -1.0, []) for token in self.prompt[1:]] if wanted else None,
        )


class FakeEngine:
    """The loop: adopt connections, take frames, make tokens, beat, write the status file."""

    def __init__(self, door_fd: int, page_fd: int, status: Path, *, grammar: bool) -> None:
        self._grammar = grammar
        self._door_fd = door_fd
        self._page = heartbeat.HeartbeatWriter(page_fd)
        self._status = status
        self._channels: list[Channel] = []
        self._requests: list[FakeRequest] = []
        self.seen = {"adds": 0, "cancels": 0, "tokens": 0, "cancelled_after_s": -1.0}
        self._numbers = 0

    def load(self, seconds: float) -> None:
        self._page.begin(os.getpid(), time.monotonic_ns())
        until = time.monotonic() + seconds
        while True:
            self._page.write(
                state=heartbeat.EngineState.LOADING,
                load_phase=heartbeat.LoadPhase.WEIGHTS,
                beat_ns=time.monotonic_ns(),
            )
            if time.monotonic() >= until:
                break
            time.sleep(0.02)

    def lock(self) -> None:
        lockdown.hold()
        self._page.write(locked=1)

    def fail(self, fault: heartbeat.StartFault) -> None:
        self._page.write(state=heartbeat.EngineState.FAILED, fault=fault)

    def run(self) -> None:
        while True:
            self._beat()
            now = time.monotonic()
            due = min((r.due_s for r in self._requests), default=now + 0.1)
            waiting = [channel.socket for channel in self._channels]
            full = [channel.socket for channel in self._channels if channel.wants_write]
            wait_s = max(0.0, min(0.1, due - now))
            readable, _, _ = select.select([self._door_fd, *waiting], full, [], wait_s)
            for channel in self._channels:
                channel.flush()
            if self._door_fd in readable:
                for connection in door.answer(self._door_fd):
                    self._numbers += 1
                    self._channels.append(Channel(connection, self._numbers))
            for channel in [c for c in self._channels if c.socket in readable]:
                self._read(channel)
            self._make_tokens()

    def _read(self, channel: Channel) -> None:
        for message, _ in channel.read():
            if isinstance(message, Hello):
                told = (message.schema, SEQUENCE_TOKENS, 260, 8, "native", None, True, self._grammar)
                channel.send(frame(Welcome(*told)))
            elif isinstance(message, Add):
                self.seen["adds"] += 1
                self._requests.append(FakeRequest(channel, message))
            elif isinstance(message, Cancel):
                for request in self._requests:
                    if request.channel is channel and request.add.id == message.id:
                        request.leave(message.choice)
                self._requests = [r for r in self._requests if r.open]
                self.seen["cancels"] += 1
        if channel.fault is not None:
            self._channels.remove(channel)
            self._requests = [r for r in self._requests if r.channel is not channel]
        self._write_status()

    def _make_tokens(self) -> None:
        now = time.monotonic()
        for request in [r for r in self._requests if r.due_s <= now]:
            deltas, last = request.step()
            self.seen["tokens"] += 1
            request.channel.send(frame(Deltas(self.seen["tokens"], deltas)))
            if last:
                self._requests.remove(request)
                self._write_status()

    def _beat(self) -> None:
        now_ns = time.monotonic_ns()
        self._page.write(
            state=heartbeat.EngineState.READY,
            beat_ns=now_ns,
            progress_ns=now_ns,
            running=len(self._requests),
            steps=self.seen["tokens"] + 1,
            kv_total_blocks=100,
            kv_used_blocks=len(self._requests),
            full_s=max((request.number("crowd", 0) for request in self._requests), default=0),
        )

    def _write_status(self) -> None:
        seen = self.seen | {"running": len(self._requests), "pid": os.getpid()}
        temporary = self._status.with_suffix(".new")
        temporary.write_text(json.dumps(seen))
        temporary.rename(self._status)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--config-fd", "--door-fd", "--heartbeat-fd"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--status", type=Path, required=True)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--fault", default="NONE")
    parser.add_argument("--grammar", choices=("yes", "no"), default="yes")
    options = parser.parse_args()
    told = config.decode(os.read(options.config_fd, 65536).decode())
    grammar = options.grammar == "yes"
    engine = FakeEngine(options.door_fd, options.heartbeat_fd, options.status, grammar=grammar)
    engine.load(options.load_s)
    if told.lockdown and options.fault != "UNLOCKED":
        engine.lock()
    if options.fault == "LINGERS":
        engine.fail(heartbeat.StartFault.INTERNAL)
        time.sleep(60)
    if options.fault not in ("NONE", "UNLOCKED"):
        engine.fail(heartbeat.StartFault[options.fault])
        return 1
    engine._write_status()
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
