"""Checks 31 to 48: a container that ran with every flag that takes something away.

Owns: these checks. Must not know: how facts are observed (container.py).
Invariant: see table.py. A container that never served passes no check here.

`Ran` holds several containers: `hardened` ran as the image's user, the others differ in one thing each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from infra.image import seccomp
from infra.image.checks.table import Findings, Table
from infra.image.container import PIDS, PORT, Facts, Process

SERVICE_ID: Final = 10001
STOP_LIMIT_S: Final = 28.0
SHM_BYTES: Final = 64 * 1024 * 1024
HEX_PORT: Final = f":{PORT:04X}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What was observed of the containers of one image."""

    hardened: Facts
    random_user: Facts  # under our own system call profile
    root: Facts  # with Docker's default capabilities: it needs some to give them all up
    strange: Facts  # no names, no time zone, an unresolvable host name


TABLE: Final = Table[Ran]()


@TABLE.check(31, "serves with a read-only root")
def read_only(ran: Ran) -> Findings:
    return _served(ran.hardened) + _flag(ran.hardened, "ReadonlyRootfs", True)


@TABLE.check(32, "serves without any capability, not privileged")
def capabilities(ran: Ran) -> Findings:
    found = _served(ran.hardened) + _flag(ran.hardened, "Privileged", False)
    held = [p for p in ran.hardened.processes for name in ("CapEff", "CapPrm") if p.number(name, 16)]
    return found + [f"process {process.pid} holds capabilities" for process in held]


@TABLE.check(33, "no process can gain privileges")
def privileges(ran: Ran) -> Findings:
    return _served(ran.hardened) + _each(
        ran.hardened, "gains privileges", lambda p: p.number("NoNewPrivs") == 1
    )


@TABLE.check(34, "serves under docker's system call profile and under our own, which allows less")
def system_calls(ran: Ran) -> Findings:
    own = [option for option in ran.random_user.host.get("SecurityOpt") or () if "seccomp=" in option]
    found = (
        [] if own and json.loads(own[0].partition("=")[2]) == seccomp.profile() else ["not under our profile"]
    )
    other = [option for option in ran.hardened.host.get("SecurityOpt") or () if "seccomp=" in option]
    found += [f"not under docker's: {option[:40]}" for option in other]
    return _served(ran.hardened) + _served(ran.random_user) + found


@TABLE.check(35, "256 processes are enough")
def pids(ran: Ran) -> Findings:
    found = _served(ran.hardened) + _flag(ran.hardened, "PidsLimit", PIDS)
    threads = sum(process.number("Threads") for process in ran.hardened.processes)
    return found + [f"{threads} threads of {PIDS}"] * (threads > PIDS)


@TABLE.check(36, "stays within its memory limit")
def memory(ran: Ran) -> Findings:
    found = _served(ran.hardened) + ["it ran out of memory"] * ran.hardened.out_of_memory
    return found + ["no memory limit was set"] * (not ran.hardened.host.get("Memory"))


@TABLE.check(37, "serves with a /tmp from which nothing can be executed")
def temporary(ran: Ran) -> Findings:
    options = str((ran.hardened.host.get("Tmpfs") or {}).get("/tmp", ""))  # noqa: S108  of the container
    missing = {"noexec", "nosuid", "nodev"} - set(options.split(","))
    return _served(ran.hardened) + [f"its temporary folder lacks {', '.join(sorted(missing))}"] * bool(
        missing
    )


@TABLE.check(38, "shares no memory with others and needs no more than 64 MiB of it")
def shared_memory(ran: Ran) -> Findings:
    size = ran.hardened.host.get("ShmSize")
    found = _served(ran.hardened) + _flag(ran.hardened, "IpcMode", "private")
    return found + [f"{size} bytes of shared memory"] * (size != SHM_BYTES)


@TABLE.check(39, "no namespace and no socket of the host")
def host(ran: Ran) -> Findings:
    facts = ran.hardened
    found = [
        f"{name} is the host's"
        for name in ("PidMode", "NetworkMode", "UTSMode", "UsernsMode")
        if facts.host.get(name) == "host"
    ]
    binds = [str(bind) for bind in facts.host.get("Binds") or ()]
    found += [
        f"mounted: {bind}"
        for bind in binds
        if "docker.sock" in bind or bind.startswith(("/:", "/etc", "/proc"))
    ]
    return _served(facts) + found + [f"not read-only: {bind}" for bind in binds if not bind.endswith(":ro")]


@TABLE.check(40, "serves as any user")
def any_user(ran: Ran) -> Findings:
    expected = ran.random_user.host.get("expected_user")
    strangers = [p.pid for p in ran.random_user.processes if _users(p) != {expected}]
    return _served(ran.random_user) + [f"process {pid} is another user's" for pid in strangers]


@TABLE.check(41, "started as root, it gives its rights up before it serves")
def root(ran: Ran) -> Findings:
    found = _served(ran.root)
    for process in ran.root.processes:
        found += [f"process {process.pid} is {sorted(_users(process))}"] * (
            _users(process) != {str(SERVICE_ID)}
        )
        found += [f"process {process.pid} is in other groups"] * bool(
            process.status.get("Groups", "").split()
        )
        held = [name for name in ("CapEff", "CapPrm", "CapInh", "CapAmb") if process.number(name, 16)]
        found += [f"process {process.pid} holds {name}" for name in held]
    return found


@TABLE.check(42, "changes no file")
def unchanged(ran: Ran) -> Findings:
    every = (ran.hardened, ran.random_user, ran.root, ran.strange)
    return _served(ran.root) + [line for facts in every for line in facts.changed]


@TABLE.check(43, "one tree of processes, none left dead, ends in time when it is told to")
def processes(ran: Ran) -> Findings:
    facts = ran.hardened
    found = [
        f"process {p.pid} is dead and still there"
        for p in facts.processes
        if p.status["State"].startswith("Z")
    ]
    inside = {p.pid for p in facts.processes}
    found += ["more than one tree"] * (sum(p.number("PPid") not in inside for p in facts.processes) != 1)
    found += [f"exit status {facts.exit_code}"] * (facts.exit_code != 0)
    return _served(facts) + found + [f"{facts.stopped_s:.1f} s to stop"] * (facts.stopped_s > STOP_LIMIT_S)


@TABLE.check(44, "exactly one port listens")
def ports(ran: Ran) -> Findings:
    listening = ran.hardened.tcp_listeners
    found = [f"listens on {', '.join(listening)}"] * (
        len(listening) != 1 or not listening[0].endswith(HEX_PORT)
    )
    return _served(ran.hardened) + found + ["a datagram socket is open"] * bool(ran.hardened.udp_sockets)


@TABLE.check(45, "the lockdown holds in every process, and nothing was sent or opened before it did")
def lockdown(ran: Ran) -> Findings:
    facts = ran.hardened
    said = {name.lower(): value for name, value in facts.ping_headers.items()}.get("strongroom-lockdown")
    found = [f"/ping says `{said}`"] * (said != "on")
    found += _each(facts, "has no filter", lambda p: p.number("Seccomp") == 2)
    found += [f"{facts.opened} connections opened"] * bool(facts.opened)
    return _served(facts) + found + [f"{facts.sent} datagrams sent"] * bool(facts.sent)


@TABLE.check(46, "what it writes is for nobody else")
def umask(ran: Ran) -> Findings:
    return _served(ran.hardened) + _each(
        ran.hardened, "shares its files", lambda p: p.number("Umask", 8) == 0o077
    )


@TABLE.check(47, "leaves no core file and shows its memory to nobody")
def core(ran: Ran) -> Findings:
    facts = ran.hardened
    found = _each(facts, "may leave a core file", lambda p: p.core_limit == "0")
    return _served(facts) + found + _each(facts, "may be read", lambda p: p.undumpable)


@TABLE.check(48, "starts without names, time zone and a host name that resolves")
def strange(ran: Ran) -> Findings:
    return _served(ran.strange)


def _served(facts: Facts) -> Findings:
    if facts.started_s is None:
        return ["it never became healthy"]
    return [] if facts.served else ["it answered no request"]


def _flag(facts: Facts, name: str, value: object) -> Findings:
    """The check says nothing unless the container ran with this."""
    return [] if facts.host.get(name) == value else [f"it ran with {name} = {facts.host.get(name)}"]


def _each(facts: Facts, fault: str, right: Callable[[Process], bool]) -> Findings:
    found = [f"process {process.pid} {fault}" for process in facts.processes if not right(process)]
    return found + ["no process was seen"] * (not facts.processes)


def _users(process: Process) -> set[str]:
    return set(process.status["Uid"].split())
