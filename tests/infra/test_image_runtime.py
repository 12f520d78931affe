"""Every check of a running container fails on the one fact it is about; /proc is read rightly."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest

from infra.image import check, seccomp
from infra.image.checks import runtime
from infra.image.checks.runtime import Ran
from infra.image.checks.table import Result
from infra.image.container import HARDENED, Facts, Process, counter, listeners, process

HOST = {
    "ReadonlyRootfs": True,
    "Privileged": False,
    "PidsLimit": 256,
    "Memory": 3 << 30,
    "Tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,size=64m"},
    "IpcMode": "private",
    "ShmSize": 64 << 20,
    "NetworkMode": "none",
    "Binds": ["/models/a:/opt/ml/model:ro"],
}


def one_process(pid: int = 10, parent: int = 1, user: int = 10001, **status: str) -> Process:
    fields = {
        **dict.fromkeys(("CapEff", "CapPrm", "CapInh", "CapAmb"), "0000000000000000"),
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "Umask": "0077",
        "Threads": "9",
        "PPid": str(parent),
        "State": "S (sleeping)",
        "Uid": "\t".join([str(user)] * 4),
        "Groups": "",
    }
    return Process(pid, fields | status, undumpable=True, core_limit="0")


def facts(user: int = 10001, **changed: Any) -> Facts:
    sound = Facts(
        started_s=9.0,
        served=True,
        ping_headers={"Strongroom-Lockdown": "on"},
        processes=(one_process(10, 1, user), one_process(11, 10, user)),
        tcp_listeners=("00000000:1F90",),
        udp_sockets=0,
        opened=0,
        sent=0,
        changed=(),
        exit_code=0,
        stopped_s=1.0,
        out_of_memory=False,
        host=HOST | {"expected_user": str(user)},
    )
    return dataclasses.replace(sound, **changed)


OWN_PROFILE = ["no-new-privileges", f"seccomp={seccomp.text()}"]
STRICT = facts(4711, host=HOST | {"expected_user": "4711", "SecurityOpt": OWN_PROFILE})
SOUND = Ran(facts(), STRICT, facts(), facts())


def hardened(**changed: Any) -> Ran:
    return dataclasses.replace(SOUND, hardened=facts(**changed))


def flag(name: str, value: object) -> Ran:
    return hardened(host=HOST | {name: value})


def with_process(**status: str) -> Ran:
    return hardened(processes=(one_process(10), one_process(11, 10, **status)))


def as_root(**changed: Any) -> Ran:
    return dataclasses.replace(SOUND, root=facts(**changed))


def with_profile(option: str) -> Facts:
    return facts(4711, host=HOST | {"expected_user": "4711", "SecurityOpt": [option]})


NEVER = {"started_s": None, "served": False, "processes": ()}
FAULTS: list[tuple[int, Ran]] = [
    (31, flag("ReadonlyRootfs", False)),
    (32, flag("Privileged", True)),
    (32, with_process(CapEff="00000000a80425fb")),
    (32, with_process(CapPrm="0000000000000001")),
    (33, with_process(NoNewPrivs="0")),
    (34, flag("SecurityOpt", ["no-new-privileges", "seccomp=unconfined"])),
    (34, dataclasses.replace(SOUND, random_user=facts(4711))),
    (34, dataclasses.replace(SOUND, random_user=with_profile('seccomp={"defaultAction":"SCMP_ACT_ALLOW"}'))),
    (35, flag("PidsLimit", None)),
    (35, with_process(Threads="300")),
    (36, flag("Memory", 0)),
    (36, hardened(out_of_memory=True)),
    (37, flag("Tmpfs", {"/tmp": "rw,nosuid,nodev"})),
    (37, flag("Tmpfs", None)),
    (38, flag("IpcMode", "host")),
    (38, flag("ShmSize", 1 << 30)),
    (39, flag("Binds", ["/var/run/docker.sock:/var/run/docker.sock:ro"])),
    (39, flag("Binds", ["/models:/opt/ml/model"])),
    (39, flag("PidMode", "host")),
    (39, flag("NetworkMode", "host")),
    (40, dataclasses.replace(SOUND, random_user=dataclasses.replace(STRICT, processes=(one_process(),)))),
    (41, as_root(processes=(one_process(user=0),))),
    (41, as_root(processes=(one_process(Groups="0 4"),))),
    (41, as_root(processes=(one_process(CapInh="0000000000000001"),))),
    (42, hardened(changed=("C /tmp", "A /tmp/x"))),
    (42, as_root(changed=("A /var/cache/x",))),
    (43, with_process(State="Z (zombie)")),
    (43, hardened(exit_code=137)),
    (43, hardened(stopped_s=29.0)),
    (43, hardened(processes=(one_process(10, 1), one_process(11, 1)))),
    (44, hardened(tcp_listeners=("00000000:1F90", "0100007F:0016"))),
    (44, hardened(tcp_listeners=())),
    (44, hardened(tcp_listeners=("00000000:1F91",))),
    (44, hardened(udp_sockets=1)),
    (45, hardened(ping_headers={"Strongroom-Lockdown": "off"})),
    (45, hardened(ping_headers={})),
    (45, with_process(Seccomp="0")),
    (45, hardened(opened=1)),
    (45, hardened(sent=2)),
    (46, with_process(Umask="0022")),
    (47, hardened(processes=(dataclasses.replace(one_process(), undumpable=False),))),
    (47, hardened(processes=(dataclasses.replace(one_process(), core_limit="unlimited"),))),
    (48, dataclasses.replace(SOUND, strange=facts(**NEVER))),
]


def failed(ran: Ran) -> set[int]:
    return {result.number for result in runtime.TABLE.run(ran) if not result.passed}


def test_a_sound_container_passes_every_check() -> None:
    assert {result.number: result.findings for result in runtime.TABLE.run(SOUND) if not result.passed} == {}


@pytest.mark.parametrize(("number", "ran"), FAULTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(FAULTS)])
def test_each_check_fails_on_the_fact_it_is_about_and_no_other_does(number: int, ran: Ran) -> None:
    assert failed(ran) == {number}


def test_a_stranger_that_is_not_served_fails_both_checks_it_ran_for() -> None:
    assert failed(dataclasses.replace(SOUND, random_user=dataclasses.replace(STRICT, served=False))) == {
        34,
        40,
    }


def test_a_container_that_never_served_passes_nothing() -> None:
    never = facts(**NEVER)
    assert failed(Ran(never, never, never, never)) == set(runtime.TABLE.checks)


def test_every_check_is_shown_to_fail_and_the_numbers_are_the_specification_s() -> None:
    assert {number for number, _ in FAULTS} == set(runtime.TABLE.checks)
    assert set(runtime.TABLE.checks) == {*range(31, 49)} - set(check.ELSEWHERE)


def test_the_flags_are_those_that_take_most_away() -> None:
    said = " ".join(HARDENED)
    for flag_ in (
        "--read-only",
        "--cap-drop ALL",
        "no-new-privileges",
        "--pids-limit 256",
        "noexec",
        "--network none",
    ):
        assert flag_ in said
    assert "--privileged" not in said and "--cap-add" not in said


TCP = """  sl  local_address rem_address   st tx_queue
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000
   1: 0100007F:1F90 0100007F:C350 01 00000000:00000000
"""
SNMP = """Tcp: RtoAlgorithm ActiveOpens PassiveOpens
Tcp: 1 3 7
Udp: InDatagrams NoPorts InErrors OutDatagrams
Udp: 1 0 0 5
"""


def test_only_listening_sockets_count_as_ports() -> None:
    assert listeners(TCP) == ("00000000:1F90",)


def test_counters_are_read_by_their_names() -> None:
    assert counter(SNMP, "Tcp", "ActiveOpens") == 3
    assert counter(SNMP, "Udp", "OutDatagrams") == 5


def test_a_process_is_described_by_what_the_kernel_says() -> None:
    own = process(os.getpid())
    assert own is not None
    assert own.number("PPid") == os.getppid()
    assert own.status["Uid"].split()[0] == str(os.getuid())
    assert own.core_limit.isdigit() or own.core_limit == "unlimited"
    assert process(2**22 + 1) is None


def test_the_report_counts_what_was_not_run_as_not_passed(capsys: pytest.CaptureFixture[str]) -> None:
    good = [Result(number, "title", ()) for number in range(1, 48)]
    report = check.summary(good)
    assert (report["ok"], report["passed"], report["not_run"]) == (False, 47, [48])
    assert check.summary([*good, Result(48, "title", ())])["ok"]
    bad = check.summary([*good, Result(48, "title", ("a finding",))])
    assert (bad["ok"], bad["failed"], bad["findings"]) == (False, [48], {"48": 1})
    assert "a finding" in capsys.readouterr().err


def test_a_start_is_broken_down_by_the_events_of_the_log() -> None:
    log = 'warning\n{"event":"listening","time":10.5}\n{"event":"locked","time":10.75,"a":1}\n'
    log += '{"event":"locked","time":12.0}\n'
    assert check.breakdown(log) == {"listening": 0.0, "locked": 0.25}
    assert check.breakdown("") == {}


def table_functions() -> list[Callable[[Ran], list[str]]]:
    return [function for _, function in runtime.TABLE.checks.values()]


def test_no_two_checks_are_the_same_function() -> None:
    assert len(set(table_functions())) == len(runtime.TABLE.checks)
