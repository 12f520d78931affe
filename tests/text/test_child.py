"""What is true of every child process of this room, whatever it does."""

from __future__ import annotations

import os

from container.text.child import Child


def test_nobody_may_read_the_memory_of_a_child() -> None:
    child = Child("tests.text.telling_child")
    try:
        child.socket.settimeout(20)
        assert child.socket.recv(1) == b"\0"
    finally:
        child.end()


def test_a_child_that_was_ended_is_reaped_and_ending_it_again_does_nothing() -> None:
    child = Child("tests.text.telling_child")
    child.socket.settimeout(20)
    child.socket.recv(1)
    child.end()
    assert child.end() is None
    assert not child.alive
    assert not os.path.exists(f"/proc/{child.pid}")
