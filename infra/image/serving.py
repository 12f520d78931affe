"""The image serving a client on this machine with everything taken away that can be.

Owns: the two ways in, and what each needs on the host: a network without a way out, or the socket's folder.
Must not know: what the image is asked, what is right or wrong about it.
Invariant: container, network and folder are gone when the context ends, whatever happened.

An internal network is no lock: the host's own addresses stay in reach of what is on it. The lockdown is one.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from infra.emulator.registry import UNIX, parse_address
from infra.emulator.upstream import connect
from infra.image.container import PORT, RESTRICTED, ROOT_RIGHTS, START_S, Container, Patience, listeners
from infra.image.docker import docker, inspect, run

INSIDE: Final = "/run/strongroom"  # where the image has a place for the socket's folder
SOCKET: Final = "http.sock"
# Docker's daemon answers names at 127.0.0.11 in every network that a person made; no process of ours listens.
RESOLVER: Final = "0B00007F"
PING_S: Final = 2.0
LOOK_EVERY_S: Final = 0.1
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class Way(enum.StrEnum):
    """How a client reaches the container."""

    INTERNAL = "internal network"
    SOCKET = "unix socket, no network"


class NeverHealthy(Exception):
    """The container ended or did not answer in time; the text ends with its log, which holds no content."""

    hint = "the lines above are the container's own"


class Serving:
    """A container of `image` that answers at `upstream`; use it as a context.

    `user` is None for the image's own, or what docker's `--user` takes; `restricted` is what is taken away;
    `network` names one that is there already and stays. Raises NeverHealthy, DockerFailed.
    """

    def __init__(
        self,
        image: str,
        model: Path,
        way: Way,
        user: str | None = None,
        *,
        environment: Mapping[str, str] = NOTHING,
        mounts: Sequence[str] = (),  # as docker's `--volume` takes them
        restricted: Sequence[str] = RESTRICTED,
        network: str = "",
    ) -> None:
        self._image, self._model, self._way, self._user = image, model, way, user
        self._environment, self._network = environment, network
        self._flags = [*restricted, *(part for mount in mounts for part in ("--volume", mount))]
        self._stack = contextlib.ExitStack()
        self.upstream = ""  # HOST:PORT or unix:/PATH
        self.start_s = 0.0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            if self._way is Way.SOCKET:
                self.container, self.upstream = self._on_socket(stack)
            else:
                self.container, self.upstream = self._on_network(stack)
            self._wait()
            self.start_s = time.monotonic() - began
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _on_socket(self, stack: contextlib.ExitStack) -> tuple[Container, str]:
        # Only we can enter the outer folder; the inner one is mounted, and any user of the container may
        # make the socket there. So the socket itself can be open to all.
        outer = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="strongroom-")))
        inner = outer / "run"
        inner.mkdir()
        inner.chmod(0o777)
        flags = ["--network", "none", "--volume", f"{inner}:{INSIDE}"]
        environment = {"STRONGROOM_LISTEN": f"{UNIX}{INSIDE}/{SOCKET}", "STRONGROOM_SOCKET_MODE": "0666"}
        return stack.enter_context(self._container(flags, environment)), f"{UNIX}{inner / SOCKET}"

    def _on_network(self, stack: contextlib.ExitStack) -> tuple[Container, str]:
        network = self._network or stack.enter_context(internal_network())
        container = stack.enter_context(self._container(["--network", network], {}))
        address = inspect(container.name, "container")["NetworkSettings"]["Networks"][network]["IPAddress"]
        return container, f"{address}:{PORT}"

    def _container(self, flags: list[str], environment: dict[str, str]) -> Container:
        rights = ROOT_RIGHTS if self._user is not None and self._user.split(":")[0] == "0" else ()
        return Container(
            self._image,
            self._model,
            user=self._user,
            flags=[*self._flags, *rights, *flags],
            environment={**self._environment, **environment},
        )

    def _wait(self) -> None:
        patience = Patience(START_S)
        while self.get("/ping")[0] != 200:
            if not self.container.state["Running"] or patience.over():
                raise NeverHealthy(f"the container was never healthy\n{self.container.log()[-2000:]}")
            time.sleep(LOOK_EVERY_S)

    def get(self, path: str) -> tuple[int, dict[str, str]]:
        """Return status and headers of one GET; status 0 when nobody answers."""
        connection = http.client.HTTPConnection("localhost", timeout=PING_S)
        try:
            connection.sock = connect(parse_address(self.upstream), PING_S)
            connection.request("GET", path)
            reply = connection.getresponse()
            reply.read()
        except (OSError, http.client.HTTPException):
            return 0, {}
        finally:
            connection.close()
        return reply.status, dict(reply.headers)

    def ports(self) -> int:
        """Return how many TCP ports listen in the container's network, docker's own aside."""
        found = [one for name in ("tcp", "tcp6") for one in listeners(self.container.network(name))]
        return sum(not address.startswith(f"{RESOLVER}:") for address in found)

    def changes(self) -> list[str]:
        """Return what the container changed in its file system; places of mounts are docker's doing."""
        mounted = [Path(one["Destination"]) for one in inspect(self.container.name, "container")["Mounts"]]
        places = {str(path) for mount in mounted for path in (mount, *mount.parents)}
        changed = docker("diff", self.container.name).splitlines()
        return [line for line in changed if line[2:] not in places]

    def users(self) -> list[int]:
        """Return the users that its processes run as."""
        return sorted({process.number("Uid") for process in self.container.processes()})


@contextlib.contextmanager
def internal_network() -> Iterator[str]:
    """Yield the name of a network without a way out; it goes afterwards. Raises DockerFailed."""
    name = f"strongroom-{uuid.uuid4().hex[:12]}"
    docker("network", "create", "--internal", name)
    try:
        yield name
    finally:
        run("network", "rm", name)


def flags_of(container: Container) -> dict[str, object]:
    """Return what docker itself says it restricts, for a report."""
    host = inspect(container.name, "container")["HostConfig"]
    names = (
        "ReadonlyRootfs",
        "CapDrop",
        "CapAdd",
        "SecurityOpt",
        "PidsLimit",
        "Memory",
        "Tmpfs",
        "NetworkMode",
    )
    return {name: host[name] for name in names if host.get(name) not in (None, [], {})}
