"""Sums and gathers between real processes, against plain sums: bit for bit, many times, with ranks that
fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from container.model.group import GroupBroken, Solo
from container.ranks.exchange import LINE_WORDS, Exchange, ExchangeBroken, What, create
from container.ranks.memory import Memory
from container.ranks.place import ALONE
from container.ranks.reduce import SUM_ELEMENTS, SharedMemoryGroup


def run(size: int, rounds: int, kind: str = "shared", start: int = 0) -> list[str]:
    """Run `size` processes of tests.ranks.summing; return what each printed; fails when one of them does."""
    exchange_fd, rendezvous_fd = create(size), os.memfd_create("rendezvous")
    memory = Memory(exchange_fd)
    for rank in range(size):
        memory.store(LINE_WORDS * rank, start)
    memory.close()
    fds = [str(exchange_fd), str(rendezvous_fd)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.summing", kind, str(rank), str(size), *fds, str(rounds)],
            pass_fds=[exchange_fd, rendezvous_fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outcomes = [process.communicate(timeout=120) for process in processes]
    os.close(exchange_fd)
    os.close(rendezvous_fd)
    for process, (_, stderr) in zip(processes, outcomes, strict=True):
        assert process.returncode == 0, stderr[-2000:]
    print(f"\n{size} ranks, {kind}: {' '.join(outcomes[0][0].split())}")
    return [stdout for stdout, _ in outcomes]


@pytest.mark.parametrize(
    ("size", "rounds", "start"), [(2, 2000, 0), (3, 500, 2**32 - 300), (4, 500, 2**31 - 300)]
)
def test_sums_and_gathers_equal_plain_ones_on_every_rank_in_thousands_of_rounds(
    size: int, rounds: int, start: int
) -> None:
    assert run(size, rounds, start=start)[0].count(" us") == 2


def test_gloo_adds_the_same_without_a_port_to_meet_at() -> None:
    assert [said.splitlines()[-1] for said in run(2, 200, "gloo")] == ["broken", "broken"]


Act = Callable[[SharedMemoryGroup], object]


def together(*acts: Act, wait_s: float = 5.0) -> list[Exception | None]:
    """Have each rank, a thread here, do its own act; return what each raised."""
    fd = create(len(acts))
    groups = [SharedMemoryGroup(Exchange(fd, rank, len(acts), wait_s)) for rank in range(len(acts))]
    raised: list[Exception | None] = [None] * len(acts)

    def perform(rank: int) -> None:
        try:
            acts[rank](groups[rank])
        except GroupBroken as error:
            raised[rank] = error

    threads = [threading.Thread(target=perform, args=(rank,)) for rank in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()
    for group, error in zip(groups, raised, strict=True):
        if error is not None and "agree" not in str(error):
            with pytest.raises(GroupBroken, match="lost before"):
                group.minimum(1)
    os.close(fd)
    return raised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda g: g.agree(bytes(32)), lambda g: g.agree(b"1" * 32)),
        (lambda g: g.all_reduce(torch.zeros(4)), lambda g: g.all_reduce(torch.zeros(5))),
        (
            lambda g: g.all_reduce(torch.zeros(4)),
            lambda g: g.all_reduce(torch.zeros(4, dtype=torch.bfloat16)),
        ),
        (lambda g: g.all_reduce(torch.zeros(SUM_ELEMENTS)), lambda g: g.all_reduce(torch.zeros(1))),
        (lambda g: g.gather_columns(torch.zeros(2, 3)), lambda g: g.gather_columns(torch.zeros(3, 3))),
        (lambda g: g.all_reduce(torch.zeros(2)), lambda g: g.minimum(1)),
    ],
)
def test_ranks_that_do_not_do_the_same_both_learn_it(one: Act, other: Act) -> None:
    assert all(isinstance(error, GroupBroken) for error in together(one, other))


def test_ranks_that_do_the_same_hear_nothing() -> None:
    def act(group: SharedMemoryGroup) -> None:
        group.agree(b"7" * 32)
        assert group.minimum(-group.rank) == -2

    assert together(act, act, act) == [None, None, None]


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_deadline() -> None:
    def act(group: SharedMemoryGroup) -> None:
        began = time.monotonic()
        try:
            group.all_reduce(torch.ones(3))
        finally:
            assert 0.3 <= time.monotonic() - began < 3.0

    first, second, _ = together(act, act, lambda _: None, wait_s=0.3)
    assert str(first) == str(second) == "rank 2 did not answer within 0.3 s"


def test_one_rank_alone_has_the_group_of_one() -> None:
    assert isinstance(ALONE.group(), Solo)


def two_ranks() -> tuple[int, list[Exchange]]:
    fd = create(2)
    return fd, [Exchange(fd, rank, 2, 0.05) for rank in (0, 1)]


def test_an_exchange_that_broke_once_stays_broken() -> None:
    fd, (first, second) = two_ranks()
    with pytest.raises(ExchangeBroken, match="rank 1 did not answer within"):
        first.meet(What(1))
    second.meet(What(1))
    with pytest.raises(ExchangeBroken, match="lost before"):
        first.meet(What(1))
    os.close(fd)


def test_what_was_laid_down_outlives_the_next_round_s_writing() -> None:
    fd, (first, second) = two_ranks()
    second.memory.store(LINE_WORDS, 1)  # rank 1 is there already, with zeros
    first.meet(What(0))
    kept = first.payload_at(0, 0)
    first.memory.bytes[kept] = 77
    assert first.parity == 1
    assert first.payload_at(first.parity, 0) != kept
    assert second.memory.bytes[kept] == 77
    os.close(fd)


def test_integers_are_not_summed() -> None:
    fd, (first, _) = two_ranks()
    with pytest.raises(AssertionError, match="float32, bfloat16 and float16"):
        SharedMemoryGroup(first).all_reduce(torch.ones(3, dtype=torch.int64))
    os.close(fd)


def test_nothing_is_summed_for_a_tensor_without_elements() -> None:
    fd, (first, _) = two_ranks()
    assert SharedMemoryGroup(first).all_reduce(torch.ones(0, 4)).shape == (0, 4)
    os.close(fd)
