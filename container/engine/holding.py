"""Who waits until another sequence has computed a prompt that both begin with.

Owns: the sequences that are HELD, what each waits for.
Must not know: blocks, queues, steps, when waiting is worth it. Standard library only.
Invariant: whoever is HELD waits for a sequence that has not ended; it goes on when that one has computed
enough, or ends.
"""

from __future__ import annotations

from container.engine.sequence import Sequence, State


class Holding:
    """Waiting sequences by the one they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[Sequence, dict[Sequence, int]] = {}  # provider -> waiter -> tokens it waits for

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, waiter: Sequence, provider: Sequence, tokens: int) -> None:
        """Let `waiter`, which is in no queue, wait until `provider` has computed `tokens`."""
        waiter.move(State.HELD)
        self._waiting.setdefault(provider, {})[waiter] = tokens

    def discard(self, waiter: Sequence) -> None:
        """Forget a sequence that is HELD."""
        for waiting in self._waiting.values():
            waiting.pop(waiter, None)

    def ready(self, provider: Sequence) -> list[Sequence]:
        """Return, in order, and forget those for whom `provider` has computed enough."""
        waiting = self._waiting.get(provider, {})
        ready = [waiter for waiter, tokens in waiting.items() if tokens <= provider.confirmed]
        for waiter in ready:
            del waiting[waiter]
        if not waiting:
            self._waiting.pop(provider, None)
        return ready

    def orphans(self, provider: Sequence) -> list[Sequence]:
        """Return, in order, and forget all that waited for `provider`, which has ended."""
        return list(self._waiting.pop(provider, {}))

    def check(self) -> None:
        """Raise AssertionError unless what this file promises holds; for tests."""
        for provider, waiting in self._waiting.items():
            assert provider.state is not State.FINISHED, "held for a sequence that has ended"
            assert all(waiter.state is State.HELD for waiter in waiting), "held, and somewhere else too"
