"""Who is watched: the image in a container, or a tree of processes in a network of its own.

Owns: starting and ending it, where it could have written. Must not know: what is asked, what a finding is.
Invariant: watching begins before its first instruction and ends after its last; all it was given is gone
when the context ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from infra.image.container import RESTRICTED, Patience, process
from infra.image.docker import inspect
from infra.image.serving import Serving, Way, internal_network
from infra.privacy.calling import read_page
from infra.privacy.network import Capture

# Whatever it writes anywhere, /tmp included, is in `docker diff`, also after its end.
_HIDES_WRITES: Final = ("--read-only", "--tmpfs")
START_S: Final = 240.0
STOP_S: Final = 30.0
# In a network of our own there is a way out, which leads nowhere: what is sent is seen, and never answered.
DECOY: Final = """
ip link set lo up
ip link add out type veth peer name end
ip link set out arp off
ip addr add 192.0.2.2/24 dev out
ip link set out up
ip link set end up
ip route add default via 192.0.2.1
"""


class Subject(Protocol):
    """What is watched, once it serves."""

    upstream: str
    pid: int  # of its first process
    address: str | None  # whose packets are its own; None: all that its network saw
    listens: bool  # on a port: one internet socket is right

    def pids(self) -> list[int]: ...

    def log(self) -> bytes: ...

    def changes(self) -> list[str]: ...

    def written(self) -> list[Path]: ...

    def stop(self) -> tuple[int, float]: ...


@dataclass(slots=True)
class Contained:
    """The image, as `serving` runs it."""

    served: Serving
    upstream: str
    pid: int
    address: str | None
    listens: bool

    def pids(self) -> list[int]:
        return [process.pid for process in self.served.container.processes()]

    def log(self) -> bytes:
        return self.served.container.log().encode()

    def changes(self) -> list[str]:
        return self.served.changes()

    def written(self) -> list[Path]:
        root = Path(f"/proc/{self.pid}/root")
        changed = [root / line[2:].lstrip("/") for line in self.served.changes()]
        every = {*changed, *_below(root / "tmp"), *_below(root / "dev" / "shm")}
        return sorted(path for path in every if path.is_file())

    def stop(self) -> tuple[int, float]:
        return self.served.container.stop()


@contextlib.contextmanager
def in_a_container(
    image: str,
    model: Path,
    way: Way,
    *,
    environment: Mapping[str, str],
    mounts: Sequence[str] = (),
) -> Iterator[tuple[Contained, Capture]]:
    """Yield the image as it serves, and the packets that it sent since its start.

    On a network it keeps a root it can write to, so that what it writes is seen; over a socket it has none.
    """
    with contextlib.ExitStack() as stack:
        if way is Way.SOCKET:
            serving = Serving(image, model, way, environment=environment, mounts=mounts)
            served = stack.enter_context(serving)
            pid = int(served.container.state["Pid"])
            capture = stack.enter_context(Capture(Path(f"/proc/{pid}/ns/net")))
            yield Contained(served, served.upstream, pid, None, listens=False), capture
            return
        network = stack.enter_context(internal_network())
        described = inspect(network, "network")
        gateway = described["IPAM"]["Config"][0]["Gateway"].split("/")[0]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = folder / "resolv.conf"  # a name server within reach: a look-up would be a packet
        names.write_text(f"nameserver {gateway}\noptions attempts:1 timeout:1\n")
        names.chmod(0o644)
        capture = stack.enter_context(Capture(interface=f"br-{described['Id'][:12]}"))
        serving = Serving(
            image,
            model,
            way,
            environment=environment,
            mounts=[*mounts, f"{names}:/etc/resolv.conf:ro"],
            restricted=_without(RESTRICTED, _HIDES_WRITES),
            network=network,
        )
        served = stack.enter_context(serving)
        pid = int(served.container.state["Pid"])
        address = served.upstream.rsplit(":", 1)[0]
        yield Contained(served, served.upstream, pid, address, listens=True), capture


def _without(flags: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """Return `flags` without `dropped`, and without what follows one that takes a value."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        if word not in dropped:
            kept.append(word)
        elif word != "--read-only":
            next(words)
    return kept


def _below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_symlink()] if folder.is_dir() else []


@dataclass(slots=True)
class Tree:
    """Processes of this machine in a network of their own."""

    first: subprocess.Popen[bytes]
    upstream: str
    pid: int
    folder: Path
    shared: frozenset[Path]  # what was in shared memory before
    address: str | None = None
    listens: bool = False

    def pids(self) -> list[int]:
        found, look = [self.pid], [self.pid]
        while look:
            children = Path(f"/proc/{look.pop()}/task")
            text = " ".join(path.read_text() for path in children.glob("*/children"))
            look += map(int, text.split())
            found += map(int, text.split())
        return [pid for pid in found if process(pid) is not None]

    def log(self) -> bytes:
        return (self.folder / "log").read_bytes()

    def changes(self) -> list[str]:
        return [f"A {path}" for path in self.written()]

    def written(self) -> list[Path]:
        shared = {path for path in _below(Path("/dev/shm")) if path not in self.shared}  # noqa: S108
        return sorted(path for path in (*_below(self.folder / "tmp"), *shared) if path.is_file())

    def stop(self) -> tuple[int, float]:
        began = time.monotonic()
        self.first.send_signal(signal.SIGTERM)
        return self.first.wait(STOP_S), time.monotonic() - began


@contextlib.contextmanager
def in_a_namespace(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, cwd: Path
) -> Iterator[tuple[Tree, Capture]]:
    """Yield `command` as it serves on a Unix socket in `folder`, and the packets of its network. Needs root.

    It is told `STRONGROOM_LISTEN` and `TMPDIR` beside `environment`. Raises OSError, RuntimeError.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    upstream = f"unix:{folder / 'http.sock'}"
    told = {**environment, "STRONGROOM_LISTEN": upstream, "TMPDIR": str(temporary)}
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(_network())
        capture = stack.enter_context(Capture(namespace))
        shared = frozenset(_below(Path("/dev/shm")))  # noqa: S108
        log = stack.enter_context((folder / "log").open("wb"))
        words = ["nsenter", f"--net={namespace}", *command]
        first = subprocess.Popen(words, cwd=cwd, env=told, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603
        stack.callback(_end, first)
        tree = Tree(first, upstream, first.pid, folder, shared)
        patience = Patience(START_S)
        while not healthy(upstream):
            if first.poll() is not None or patience.over():
                raise RuntimeError(f"it was never healthy: {tree.log()[-1000:].decode('utf-8', 'replace')}")
            time.sleep(0.05)
        yield tree, capture


def healthy(upstream: str) -> bool:
    try:
        return read_page(upstream, "/ping")[0] == 200
    except OSError:
        return False


def _end(first: subprocess.Popen[bytes]) -> None:
    if first.poll() is None:
        first.terminate()
        try:
            first.wait(STOP_S)
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()


@contextlib.contextmanager
def _network() -> Iterator[Path]:
    """Yield a network namespace with a way out that leads nowhere."""
    program = shutil.which("unshare") or "unshare"
    holder = subprocess.Popen(  # noqa: S603
        [program, "--net", "sh", "-ec", DECOY + "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise OSError("a network namespace of our own cannot be made")
        yield Path(f"/proc/{holder.pid}/ns/net")
    finally:
        holder.communicate()


def kept(pid: int) -> tuple[int, Path]:
    """Return a descriptor that keeps a process's network alive after it, and its path."""
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    return fd, Path(f"/proc/{os.getpid()}/fd/{fd}")


Watched = contextlib.AbstractContextManager[tuple[Subject, Capture]]
