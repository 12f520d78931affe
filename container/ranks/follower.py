"""A follower: one of the ranks that hold a model together with rank 0, from its first instruction to its end.

Owns: its start, and the loop that reads an order and obeys.
Must not know: requests, sockets, time, policy: it decides nothing and answers nothing.
Invariant: it does what rank 0's own runner does, in the same order. Whatever goes wrong here ends the
process, with the cause in its status words; rank 0 notices, tells the operator, and ends too.

    python -m container.ranks.follower --rank N --parent PID --config-fd N --exchange-fd N --ring-fd N ...
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Final, Protocol

from container.engine.step import Runner
from container.ranks.assembly import Loader, load
from container.ranks.exchange import Exchange
from container.ranks.faults import diagnose
from container.ranks.heartbeat import LoadPhase
from container.ranks.main import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_START,
    lock_at_start,
    lock_when_connected,
    read_config,
    without_collection,
)
from container.ranks.place import LOAD_WAIT_S, Place
from container.ranks.plans import BadCommand, Order, decode
from container.ranks.process import harden
from container.ranks.ring import RingReader
from container.ranks.status import RankStatus, Stage

FDS: Final = ("--config-fd", "--exchange-fd", "--ring-fd", "--status-fd", "--rendezvous-fd")


class Orders(Protocol):
    """The reading end of the ring."""

    def receive(self) -> bytes: ...


def main(argv: Sequence[str] | None = None, loader: Loader = load) -> int:
    """Run a follower until rank 0 closes it; return the exit status."""
    parser = argparse.ArgumentParser(prog="container.ranks.follower", allow_abbrev=False)
    for name in (*FDS, "--rank", "--parent"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args(argv)
    harden(niceness=0)  # rank 0's is inherited
    if os.getppid() != options.parent:
        return EXIT_START  # it died before the kernel was told to end us with it
    status = RankStatus(options.status_fd)
    rank: int = options.rank
    code = EXIT_START
    try:
        runner, ring = _start(options, status, loader)
        code = EXIT_FAILED
        follow(runner, ring)
    except Exception as error:  # noqa: BLE001 - told by rank 0, by type
        status.fail(rank, *diagnose(error))
        return code
    return EXIT_OK


def follow(runner: Runner, orders: Orders) -> None:
    """Obey until told to close; raises what `runner` and the ring raise."""
    while True:
        command = decode(orders.receive())
        if command.order is Order.RUN:
            if command.plan is None:
                raise BadCommand("an order to run without a plan")
            runner.run(command.plan)
        elif command.order is Order.RESET:
            runner.reset()
        else:
            runner.close()
            return


def _start(options: argparse.Namespace, status: RankStatus, loader: Loader) -> tuple[Runner, RingReader]:
    rank: int = options.rank

    def report(_: LoadPhase) -> None:
        status.progress(rank, Stage.LOADING)

    report(LoadPhase.OPENING)
    config = read_config(options.config_fd)
    lock_at_start(config)
    size = config.tensor_parallel
    ring = RingReader(options.ring_fd, size - 1, rank - 1)
    exchange = Exchange(options.exchange_fd, rank, size, LOAD_WAIT_S)
    place = Place(rank, size, exchange, f"/proc/self/fd/{options.rendezvous_fd}")
    with without_collection():
        loaded = loader(config, report, place)
    lock_when_connected(config)
    place.serving(config.rank_wait_s)
    status.progress(rank, Stage.READY)
    return loaded.runner, ring


if __name__ == "__main__":
    os._exit(main())  # without finalizing: native threads of a broken group may never end
