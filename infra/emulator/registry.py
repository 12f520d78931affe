"""Which endpoints exist and where their containers listen.

Owns: endpoints by name. Must not know: HTTP, how a container is started.
Invariant: names and addresses in it are well formed; readers see an endpoint whole or not at all.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from infra.emulator.queueing import AsyncConfig
from infra.emulator.upstream import Address

# The service model allows 63 characters.
_NAME: Final = re.compile(r"[a-zA-Z0-9](?:-*[a-zA-Z0-9]){0,62}")
NAME_CHARACTERS: Final = 63
UNIX: Final = "unix:"


def parse_address(text: str) -> Address:
    """Return (host, port) of `HOST:PORT` (`[HOST]:PORT` for IPv6), or the path of `unix:/PATH`.

    Raises ValueError for anything else.
    """
    if text.startswith(UNIX) and Path(text.removeprefix(UNIX)).is_absolute():
        return Path(text.removeprefix(UNIX))
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("`upstream` must be HOST:PORT or unix:/PATH")
    return host.strip("[]"), int(port)


def check_name(name: str) -> str:
    """Return `name`; raises ValueError if SageMaker would not accept it."""
    if len(name) > NAME_CHARACTERS or _NAME.fullmatch(name) is None:
        raise ValueError(f"a name has 1 to {NAME_CHARACTERS} letters, digits and inner hyphens")
    return name


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint of one variant; with `components`, each has its own container and must be named.

    `asynchronous`: calls are queued and answered in a store, and no others are taken.
    """

    name: str
    upstream: Address
    variant: str = "AllTraffic"
    components: Mapping[str, Address] = field(default_factory=dict)
    asynchronous: AsyncConfig | None = None

    def __post_init__(self) -> None:
        for name in (self.name, self.variant, *self.components):
            check_name(name)


class Registry:
    """The endpoints now in service; safe to use from any thread."""

    def __init__(self) -> None:
        self._endpoints: dict[str, Endpoint] = {}
        self._lock = threading.Lock()

    def put(self, endpoint: Endpoint) -> None:
        """Add `endpoint`, or replace the one of that name."""
        with self._lock:
            self._endpoints[endpoint.name] = endpoint

    def remove(self, name: str) -> None:
        """Take an endpoint out; raises KeyError if there is none of that name."""
        with self._lock:
            del self._endpoints[name]

    def find(self, name: str) -> Endpoint | None:
        """Return the endpoint called `name`, None if there is none."""
        with self._lock:
            return self._endpoints.get(name)

    def all(self) -> tuple[Endpoint, ...]:
        """Return every endpoint, ordered by name."""
        with self._lock:
            return tuple(sorted(self._endpoints.values(), key=lambda endpoint: endpoint.name))
