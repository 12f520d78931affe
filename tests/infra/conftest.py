"""Clients and emulators for the tests of this room; every emulator must end without a fault of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config

from infra.emulator import Emulator
from tests.infra.scripted import Script, ScriptedContainer

ENDPOINT = "demo"


@contextlib.contextmanager
def closing_client(
    emulator: Emulator, service: str = "sagemaker-runtime", *, unchecked: bool = False, **extra: Any
) -> Iterator[Any]:
    """An unmodified boto3 client of `emulator`, without retries, closed at the end.

    `unchecked`: it sends what its own checks would refuse.
    """
    config = Config(
        retries={"total_max_attempts": 1},
        read_timeout=20,
        connect_timeout=5,
        max_pool_connections=80,
        parameter_validation=not unchecked,
    )
    client = boto3.client(service, config=config, **{**emulator.boto3_arguments(), **extra})
    try:
        yield client
    finally:
        client.close()


class Bench:
    """An emulator in front of a scripted container, with a client."""

    def __init__(self, container: ScriptedContainer, emulator: Emulator, client: Any) -> None:
        self.container = container
        self.emulator = emulator
        self.client = client


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Return a function that starts a bench for a script, with options of the emulator."""
    with contextlib.ExitStack() as stack:
        emulators: list[Emulator] = []

        def start(script: Script, **options: Any) -> Bench:
            container = stack.enter_context(ScriptedContainer(script))
            emulator = stack.enter_context(Emulator(container.address, ENDPOINT, **options))
            emulators.append(emulator)
            return Bench(container, emulator, stack.enter_context(closing_client(emulator)))

        yield start
    assert [emulator.faults for emulator in emulators] == [0] * len(emulators)
