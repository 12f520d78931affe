"""One running container of the image, and what can be observed of it from outside.

Owns: the flags it is started with, the calls into its network, the facts that checks judge.
Must not know: what is right or wrong about a fact.
Invariant: the container is gone when the context ends, whatever happened in it. Observing changes nothing in
it: no program is started inside, since there is none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from infra.image.docker import docker, inspect, run

MEMORY: Final = "3g"
PIDS: Final = 256
PORT: Final = 8080
START_S: Final = 120.0
TMPFS: Final = "/tmp:rw,noexec,nosuid,nodev,size=64m"  # noqa: S108  a place in the container
STOP_S: Final = 30
# As the documentation tells an operator to run it; and the network that is none.
RESTRICTED: Final = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--pids-limit", str(PIDS), "--memory", MEMORY, "--memory-swap", MEMORY, "--ipc", "private"),
    *("--shm-size", "64m", "--ulimit", "core=0", "--tmpfs", TMPFS),
)
HARDENED: Final = (*RESTRICTED, "--network", "none")
# What root needs to become somebody else; it gives them up, too.
ROOT_RIGHTS: Final = ("--cap-add", "SETUID", "--cap-add", "SETGID")
# In the container's network, from outside: no way in is needed, and no program inside.
CALL: Final = """
import http.client, json, sys
method, path, body, limit = sys.argv[1:]
c = http.client.HTTPConnection("127.0.0.1", %d, timeout=float(limit))
c.request(method, path, body or None, {"Content-Type": "application/json"} if body else {})
r = c.getresponse()
print(json.dumps([r.status, dict(r.headers), r.read().decode("utf-8", "replace")]))
"""


@dataclass(frozen=True, slots=True)
class Process:
    """What the kernel says of one process of the container."""

    pid: int
    status: Mapping[str, str]
    undumpable: bool
    core_limit: str

    def number(self, name: str, base: int = 10) -> int:
        """Return a field of the status that is one number."""
        return int(self.status[name].split()[0], base)


class Patience:
    """A limit on waiting that does not count what happens to both sides: a machine that stood still.

    Whoever waits looks again within moments; a longer gap counts as LOOK_S.
    """

    LOOK_S: Final = 5.0

    def __init__(self, limit_s: float) -> None:
        self._left_s = limit_s
        self._looked_s = time.monotonic()

    def over(self) -> bool:
        now_s = time.monotonic()
        self._left_s -= min(now_s - self._looked_s, self.LOOK_S)
        self._looked_s = now_s
        return self._left_s <= 0


PLAINTEXT: Final = {"STRONGROOM_ALLOW_PLAINTEXT": "on"}  # for a model that is no sealed package


@dataclass(frozen=True, slots=True)
class Facts:
    """All that was observed of a container that started, served and stopped."""

    started_s: float | None  # to the first 200 on /ping; None: it never came
    served: bool  # a request was answered with 200
    ping_headers: Mapping[str, str]
    processes: tuple[Process, ...]
    tcp_listeners: tuple[str, ...]  # address:port, hexadecimal, as in /proc/net/tcp
    udp_sockets: int
    opened: int  # connections that were not ours, of the network's own counter
    sent: int  # datagrams
    changed: tuple[str, ...]  # docker diff
    exit_code: int
    stopped_s: float
    out_of_memory: bool
    host: Mapping[str, Any] = field(default_factory=dict)  # HostConfig
    log: str = field(default="", repr=False)


class Container:
    """A container of `image` with `model` mounted; use it as a context."""

    def __init__(
        self,
        image: str,
        model: Path | None,
        *,
        user: str | None = None,
        flags: Sequence[str] = HARDENED,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = ("serve",),
    ) -> None:
        self.name = f"strongroom-check-{uuid.uuid4().hex[:12]}"
        self._arguments = ["--name", self.name, *flags]
        if user is not None:
            self._arguments += ["--user", user]
        if model is not None:
            self._arguments += ["--volume", f"{model}:/opt/ml/model:ro"]
        allowed = {} if model is None or (model / "manifest.sig").exists() else PLAINTEXT
        for name, value in {**allowed, **(environment or {})}.items():
            self._arguments += ["--env", f"{name}={value}"]
        self._image = image
        self._command = command
        self._began_s = 0.0
        self.calls = 0  # connections of ours into its network, which the network's counters hold too

    def __enter__(self) -> Container:
        self._began_s = time.monotonic()
        docker("run", "--detach", *self._arguments, self._image, *self._command)
        return self

    def __exit__(self, *_: object) -> None:
        run("rm", "--force", "--volumes", self.name)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = inspect(self.name, "container")["State"]
        return state

    def wait_healthy(self, limit_s: float = START_S) -> float | None:
        """Return the seconds from `docker run` to the first 200 on /ping; None when that never came."""
        patience = Patience(limit_s)
        while not patience.over():
            if not self.state["Running"]:
                return None
            if self.call("GET", "/ping")[0] == 200:
                return time.monotonic() - self._began_s
            time.sleep(0.05)
        return None

    def call(
        self, method: str, path: str, body: str = "", limit_s: float = 60.0
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers and body of one request; status 0 when nobody answers."""
        self.calls += 1
        command = ["nsenter", "--target", str(self.state["Pid"]), "--net", sys.executable, "-c", CALL % PORT]
        done = subprocess.run(  # noqa: S603  a fixed program
            [*command, method, path, body, str(limit_s)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return 0, {}, ""
        status, headers, text = json.loads(done.stdout)
        return status, headers, text

    def processes(self) -> tuple[Process, ...]:
        """Return every process of the container."""
        listed = docker("top", self.name, "-eo", "pid").split()[1:]
        return tuple(observed for pid in map(int, listed) if (observed := process(pid)) is not None)

    def network(self, name: str) -> str:
        """Return a file of the container's network, such as `tcp`."""
        return Path(f"/proc/{self.state['Pid']}/net/{name}").read_text()

    def stop(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit status and the seconds it took."""
        began = time.monotonic()
        docker("stop", "--time", str(STOP_S), self.name)
        return int(self.state["ExitCode"]), time.monotonic() - began

    def log(self) -> str:
        done = run("logs", self.name)
        return done.stdout + done.stderr


def process(pid: int) -> Process | None:
    """Return what /proc says of a process of another; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        limits = Path(f"/proc/{pid}/limits").read_text()
        # the kernel gives the files of an undumpable process to root
        uid = re.search(r"^Uid:\t(\d+)", text, re.MULTILINE)
        undumpable = Path(f"/proc/{pid}/environ").stat().st_uid == 0 and uid is not None and uid[1] != "0"
    except (FileNotFoundError, ProcessLookupError):
        return None
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    core = next(line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size"))
    return Process(pid, status, undumpable, core)


def listeners(tcp: str) -> tuple[str, ...]:
    """Return the local addresses of the listening sockets in the text of /proc/net/tcp."""
    rows = [line.split() for line in tcp.splitlines()[1:]]
    return tuple(row[1] for row in rows if row[3] == "0A")


def counter(snmp: str, protocol: str, name: str) -> int:
    """Return one counter of the text of /proc/net/snmp."""
    names, values = (line.split() for line in snmp.splitlines() if line.startswith(f"{protocol}:"))
    return int(values[names.index(name)])


def observe(container: Container, request: str) -> Facts:
    """Start, call, watch and stop `container`; `request` is a body for /invocations."""
    started_s = container.wait_healthy()
    if started_s is None:
        code = int(container.state["ExitCode"])
        host = inspect(container.name, "container")["HostConfig"]
        return Facts(None, False, {}, (), (), 0, 0, 0, (), code, 0.0, False, host, container.log())
    headers = container.call("GET", "/ping")[1]
    served = container.call("POST", "/invocations", request)[0] == 200
    processes = container.processes()
    snmp, calls = container.network("snmp"), container.calls
    tcp = (*listeners(container.network("tcp")), *listeners(container.network("tcp6")))
    udp = sum(len(container.network(name).splitlines()) - 1 for name in ("udp", "udp6"))
    changed = tuple(docker("diff", container.name).splitlines())
    host = inspect(container.name, "container")["HostConfig"]
    code, stopped_s = container.stop()
    return Facts(
        started_s,
        served,
        headers,
        processes,
        tcp,
        udp,
        counter(snmp, "Tcp", "ActiveOpens") - calls,
        counter(snmp, "Udp", "OutDatagrams"),
        changed,
        code,
        stopped_s,
        bool(container.state["OOMKilled"]),
        host,
        container.log(),
    )
