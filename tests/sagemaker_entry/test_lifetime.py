"""The end of a lifetime and the watch on clients' sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import gevent
import pytest

from sagemaker_entry import log
from sagemaker_entry.lifetime import WATCH_INTERVAL_S, ClientWatch, End, Lifetime


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(3)]
    yield made
    for pair in made:
        for each in pair:
            each.close()


def turn(rounds: int = 3) -> None:
    gevent.sleep(WATCH_INTERVAL_S * rounds)


def test_a_lifetime_ends_once_and_tells_once() -> None:
    told: list[str] = []
    lifetime = Lifetime()
    lifetime.on_end(lambda: told.append("told"))
    lifetime.end(End.DRAINING)
    lifetime.end(End.CLIENT_LEFT)
    assert (lifetime.reason, told) == (End.DRAINING, ["told"])


def test_whoever_registers_after_the_end_is_called_at_once_and_nobody_when_withdrawn() -> None:
    told: list[str] = []
    lifetime = Lifetime()
    lifetime.on_end(lambda: told.append("first"))
    lifetime.on_end(None)
    lifetime.end(End.CLIENT_LEFT)
    assert told == []
    lifetime.on_end(lambda: told.append("late"))
    assert told == ["late"]


def test_only_the_lifetime_of_the_client_that_left_ends(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    watch = ClientWatch()
    lifetimes = [Lifetime() for _ in pairs]
    for (ours, _), lifetime in zip(pairs, lifetimes, strict=True):
        watch.add(ours.fileno(), lifetime)
    pairs[0][1].sendall(b"the next request")  # data alone is no sign of an end
    pairs[1][1].close()
    turn()
    assert [lifetime.reason for lifetime in lifetimes] == [None, End.CLIENT_LEFT, None]
    for ours, _ in pairs:
        watch.remove(ours.fileno())


def test_an_exchange_that_is_over_is_not_watched_any_more(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    watch = ClientWatch()
    lifetime = Lifetime()
    ours, theirs = pairs[0]
    watch.add(ours.fileno(), lifetime)
    watch.remove(ours.fileno())
    watch.remove(ours.fileno())
    theirs.close()
    turn()
    assert lifetime.reason is None


def test_the_watch_rests_when_nobody_is_there_and_wakes_for_the_next(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    watch = ClientWatch()
    for ours, theirs in pairs:
        lifetime = Lifetime()
        watch.add(ours.fileno(), lifetime)
        theirs.close()
        turn()
        assert lifetime.reason is End.CLIENT_LEFT
        turn()  # long enough for the watch to have gone to rest


def test_one_end_may_remove_another_client_of_the_same_round(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    watch = ClientWatch()
    lifetimes = [Lifetime() for _ in pairs]
    numbers = [ours.fileno() for ours, _ in pairs]
    for number, lifetime in zip(numbers, lifetimes, strict=True):
        watch.add(number, lifetime)
    lifetimes[0].on_end(lambda: watch.remove(numbers[1]))
    lifetimes[1].on_end(lambda: watch.remove(numbers[0]))
    for _, theirs in pairs:
        theirs.close()
    turn()
    assert [lifetime.reason for lifetime in lifetimes].count(End.CLIENT_LEFT) == 2
    assert lifetimes[2].reason is End.CLIENT_LEFT


def test_a_callback_that_fails_does_not_blind_the_watch(
    pairs: list[tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[str, str]] = []
    monkeypatch.setattr(log, "write", lambda level, event, **_: lines.append((level, event)))
    watch = ClientWatch()
    lifetime = Lifetime()

    def fail() -> None:
        raise RuntimeError("unforeseen")

    lifetime.on_end(fail)
    following = Lifetime()
    watch.add(pairs[0][0].fileno(), lifetime)
    watch.add(pairs[1][0].fileno(), following)
    pairs[0][1].close()
    turn()
    assert lines == [("error", "end_failed")]
    pairs[1][1].close()
    turn()
    assert following.reason is End.CLIENT_LEFT, "one failure ended the watch over every later client"
