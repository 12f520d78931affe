"""Sums and gathers between real processes, against plain sums: bit for bit, many times, with ranks that fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from container.model.group import Solo
from container.ranks.exchange import LINE_WORDS, Exchange, ExchangeBroken, What, create
from container.ranks.memory import Memory
from container.ranks.place import ALONE
from container.ranks.reduce import SharedMemoryGroup


def run(size: int, work: str, *arguments: str, kind: str = "shared", start: int = 0) -> list[str]:
    """Run `work` in `size` processes and return what each printed; fails when one of them does."""
    exchange_fd, rendezvous_fd = create(size), os.memfd_create("rendezvous")
    if start:
        memory = Memory(exchange_fd)
        for rank in range(size):
            memory.store(LINE_WORDS * rank, start)
        memory.close()
    fixed = [str(size), str(exchange_fd), str(rendezvous_fd), work, *arguments]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.summing", kind, str(rank), *fixed],
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
    return [stdout for stdout, _ in outcomes]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_and_gathers_of_all_shapes_equal_plain_ones(size: int) -> None:
    run(size, "shapes")


@pytest.mark.parametrize(("size", "start"), [(2, 0), (3, 2**32 - 900), (4, 2**31 - 900)])
def test_thousands_of_rounds_leave_the_same_bits_on_every_rank(size: int, start: int) -> None:
    run(size, "rounds", "2000", start=start)


def test_gloo_adds_the_same_without_a_port_to_meet_at() -> None:
    run(2, "shapes", kind="gloo")


@pytest.mark.parametrize("kind", ["shared", "gloo"])
def test_how_long_a_sum_of_two_ranks_takes_is_printed(kind: str) -> None:
    said = run(2, "latency", "100", kind=kind)[0]
    print(f"\n{kind}: {said.strip()}")
    assert said.count(" us") == 2


@pytest.mark.parametrize("how", ["digest", "shape", "dtype", "rows", "operation"])
def test_ranks_that_do_not_do_the_same_learn_it(how: str) -> None:
    for said in run(2, "disagree", how):
        assert said.splitlines()[0] == "broken"
        if how != "digest":
            assert said.splitlines()[1:] == ["for ever"]


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_deadline() -> None:
    *waiting, _ = run(3, "absent")
    for said in waiting:
        word, waited_s, text = said.split(maxsplit=2)
        assert word == "broken"
        assert 0.9 < float(waited_s) < 2.0
        assert text.strip() == "rank 2 did not answer within 1.0 s"


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
