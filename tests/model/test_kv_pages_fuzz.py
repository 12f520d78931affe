"""Random calls on paged keys and values agree with a model of dicts, invariants checked after each step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from container.model.kv_limits import KVBudgetExceeded
from tests.model.test_kv_pages import BLOCK, BLOCKS, cache, page_at


@dataclass
class Model:
    """What PagedKV promises, with dicts and one stamp per page instead of memory."""

    slots: dict[int, tuple[list[int], int]] = field(default_factory=dict)  # stamps, tokens
    names: dict[int, int] = field(default_factory=dict)  # block -> stamp

    def locked(self, stamp: int) -> bool:
        readers = sum(stamp in stamps for stamps, _ in self.slots.values())
        return readers > 1 or stamp in self.names.values()

    def resident(self) -> int:
        most: dict[int, int] = {}
        for stamps, tokens in self.slots.values():
            for index, stamp in enumerate(stamps):
                most[stamp] = min(BLOCK, tokens - index * BLOCK)
        return sum(most.values())


class Fuzz:
    """Random calls on both; every page carries its stamp, so that a mix-up is seen."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kv = cache(resident_tokens=600)
        self.model = Model()
        self.stamps = 0

    def grow(self, slot: int) -> None:
        stamps, tokens = self.model.slots.get(slot, ([], 0))
        wanted = min(1000, tokens + self.rng.randint(1, 90))
        if self.model.resident() + wanted - tokens > 600:
            with pytest.raises(KVBudgetExceeded):
                self.kv.place(slot, wanted)
            return
        addresses = self.kv.place(slot, wanted)
        stamps = list(stamps)
        while len(stamps) < len(addresses):
            self.stamps += 1
            page = page_at(self.kv, int(addresses[len(stamps)]))
            assert not page.any(), "a new page is not zero"
            page.view(np.int64)[:] = self.stamps
            stamps.append(self.stamps)
        self.model.slots[slot] = (stamps, wanted)

    def release(self, slot: int) -> None:
        self.kv.release(slot)
        self.model.slots.pop(slot, None)

    def save(self, slot: int) -> None:
        stamps, tokens = self.model.slots.get(slot, ([], 0))
        if tokens >= BLOCK:
            index, block = self.rng.randrange(tokens // BLOCK), self.rng.randint(0, BLOCKS)
            self.kv.save(slot, index, block)
            self.model.names[block] = stamps[index]

    def forget(self, slot: int) -> None:
        block = self.rng.randint(0, BLOCKS)
        self.kv.forget(block)
        self.model.names.pop(block, None)

    def restore(self, slot: int) -> None:
        self.release(slot)
        by_stamp = {stamp: block for block, stamp in self.model.names.items()}
        blocks = self.rng.sample(sorted(by_stamp.values()), min(len(by_stamp), self.rng.randint(1, 5)))
        stamps = [self.model.names[block] for block in blocks]
        read = {stamp for held, _ in self.model.slots.values() for stamp in held}
        if self.model.resident() + BLOCK * len(set(stamps) - read) > 600:
            with pytest.raises(KVBudgetExceeded):
                self.kv.restore(slot, blocks)
            return
        self.kv.restore(slot, blocks)
        self.model.slots[slot] = (stamps, BLOCK * len(blocks))

    def truncate(self, slot: int) -> None:
        stamps, tokens = self.model.slots.get(slot, ([], 0))
        if not tokens:
            return
        wanted = self.rng.randint(max(0, tokens - 40), tokens)
        if wanted < tokens and any(self.model.locked(stamp) for stamp in stamps[wanted // BLOCK :]):
            with pytest.raises(AssertionError, match="published"):
                self.kv.truncate(slot, wanted)
            return
        self.kv.truncate(slot, wanted)
        self.model.slots[slot] = (stamps[: -(-wanted // BLOCK)], wanted)

    def compare(self) -> None:
        self.kv.check()
        assert self.kv.resident_tokens == self.model.resident()
        assert self.kv.stored_blocks == len(self.model.names)
        for slot, (stamps, tokens) in self.model.slots.items():
            assert self.kv.written(slot) == tokens
            addresses = self.kv.place(slot, tokens).tolist()
            assert len(addresses) == len(stamps)
            for address, stamp in zip(addresses, stamps, strict=True):
                assert (page_at(self.kv, address).view(np.int64) == stamp).all()


@pytest.mark.parametrize("seed", range(4))
def test_random_use_agrees_with_a_model_of_dicts(seed: int) -> None:
    fuzz = Fuzz(seed)
    steps = [fuzz.grow, fuzz.grow, fuzz.grow, fuzz.save, fuzz.save, fuzz.restore, fuzz.truncate]
    steps += [fuzz.release, fuzz.forget]
    for _ in range(400):
        fuzz.rng.choice(steps)(fuzz.rng.randrange(4))
        fuzz.compare()
    fuzz.kv.reset()
    fuzz.kv.check()
    assert fuzz.kv._memory.held_pages == 0
