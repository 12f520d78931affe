"""One choice of one request on its way through the engine: its state, its tokens, its place in memory.

Owns: the table of legal states, token history, how much of it has keys and values, blocks held, seeds.
Must not know: other sequences, policy, the runner. Standard library only.
Invariant: `computed` <= `total` = prompt + generated; only a RUNNING sequence holds a slot and blocks.
While a step is under way that samples for it, its last token is not known yet (`expects`): history ends in a
placeholder that nobody may read, and that counts as generated.

    NEW ---> ASIDE ---> HELD <--> WAITING ---> RUNNING ---> FINISHED    every queued state may go to FINISHED
     |         |         ^          ^           |   ^
     |         +---------|----------+           v   |
     +-------------------+----------+         PREEMPTED
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from container.engine.guesses import Guesses
from container.engine.request import SEED_BITS, EngineRequest, RequestKey, SampledToken, SamplingParams

PLACEHOLDER: Final = 0
SEED_DOMAIN: Final = b"strongroom/choice-seed/v1"


class State(enum.Enum):
    """Where a sequence stands."""

    NEW = "new"  # made, not queued yet
    ASIDE = "aside"  # its grammar is being compiled
    HELD = "held"  # another computes a prompt it begins with: it will take that from the prefix cache
    WAITING = "waiting"
    RUNNING = "running"  # owns a slot and blocks
    PREEMPTED = "preempted"  # waits again; its tokens are kept, its keys and values are computed anew
    FINISHED = "finished"


LEGAL: Final[Mapping[State, frozenset[State]]] = MappingProxyType(
    {
        State.NEW: frozenset({State.ASIDE, State.HELD, State.WAITING}),
        State.ASIDE: frozenset({State.HELD, State.WAITING, State.FINISHED}),
        State.HELD: frozenset({State.WAITING, State.FINISHED}),
        State.WAITING: frozenset({State.HELD, State.RUNNING, State.FINISHED}),
        State.RUNNING: frozenset({State.PREEMPTED, State.FINISHED}),
        State.PREEMPTED: frozenset({State.RUNNING, State.FINISHED}),
        State.FINISHED: frozenset(),
    }
)


class IllegalMove(AssertionError):
    """A sequence was moved along an arrow that the table does not have: a fault of ours."""


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of one choice: the request's own for choice 0, an unrelated one for each other."""
    if choice == 0:
        return seed
    message = SEED_DOMAIN + seed.to_bytes(SEED_BITS // 8, "little") + choice.to_bytes(4, "little")
    return int.from_bytes(hashlib.sha256(message).digest()[: SEED_BITS // 8], "little")


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One choice: created by `of`, moved by `move`; all other fields are written by the scheduler.

    `serial` orders sequences by arrival and never changes, so a preempted sequence keeps its age.
    """

    request: EngineRequest
    choice: int
    serial: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    history: array[int]  # prompt, then what was generated
    root: bytes  # start of its chain of prefix keys
    state: State = State.NEW
    computed: int = 0  # tokens whose keys and values are valid, or will be after the step under way
    confirmed: int = 0  # those of them that steps which have ended computed
    expects: bool = False  # the last token of its history is a placeholder: its step is under way
    table: list[int] = field(default_factory=list)  # block ids in order
    announced: int = 0  # table entries the runner has been told
    offered: int = 0  # leading blocks that were published, or were known to be already
    slot: int | None = None
    keys: list[bytes] = field(default_factory=list)  # prefix keys of the full blocks, as far as needed yet
    preemptions: int = 0
    paid: bool = False  # charged to its tenant; a preempted sequence is not charged again
    cached_tokens: int | None = None  # prefix hit of its first admission
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    guesses: Guesses | None = None  # made when it first speculates

    @classmethod
    def of(cls, request: EngineRequest, choice: int, serial: int, root: bytes) -> Sequence:
        """Return choice number `choice` of `request`, NEW, nothing computed."""
        seed = choice_seed(request.sampling.seed, choice)
        return cls(
            request=request,
            choice=choice,
            serial=serial,
            sampling=dataclasses.replace(request.sampling, seed=seed),
            stop_token_ids=tuple(sorted(request.stop_token_ids)),
            history=array("i", request.prompt),
            root=root,
        )

    def __repr__(self) -> str:
        return (
            f"Sequence(key={self.key}, choice={self.choice}, state={self.state.value}, "
            f"computed={self.computed}, total={self.total})"
        )

    @property
    def key(self) -> RequestKey:
        return self.request.key

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def total(self) -> int:
        return len(self.history)

    @property
    def generated(self) -> int:
        return len(self.history) - len(self.request.prompt)  # not by way of properties: once a row and step

    @property
    def remaining(self) -> int:
        """Tokens known but not computed; 1 means that it decodes."""
        return len(self.history) - self.computed

    @property
    def known(self) -> int:
        """Tokens whose ids are known."""
        return len(self.history) - self.expects

    @property
    def complete(self) -> bool:
        """True when the token that is under way is its last, whatever it is."""
        return self.expects and self.generated >= self.request.max_tokens

    @property
    def limit_tokens(self) -> int:
        """The most tokens it can ever hold."""
        return self.prompt_tokens + self.request.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until all of them have been collected: such a prompt must be computed, not looked up."""
        asked = self.sampling.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < self.prompt_tokens - 1

    def expect(self) -> None:
        """Count a token that a step under way samples."""
        assert not self.expects, "one token is under way at most"
        self.history.append(PLACEHOLDER)
        self.expects = True

    def receive(self) -> None:
        """Take the placeholder away: the step has ended, and whoever calls this appends what it sampled."""
        if self.expects:
            self.history.pop()
            self.expects = False

    def move(self, state: State) -> None:
        """Go to `state`; raises IllegalMove when the table has no such arrow."""
        if state not in LEGAL[self.state]:
            raise IllegalMove(f"a sequence cannot go from {self.state.value} to {state.value}")
        self.state = state

    def forget_computed(self) -> None:
        """Drop everything that is tied to a slot; tokens, seed, keys and age stay."""
        self.computed = self.confirmed = 0
        self.table = []
        self.announced = 0
        self.offered = 0
        self.slot = None
        if self.wants_prompt_logprobs:
            self.prompt_logprobs = []  # computed again from the first token on
