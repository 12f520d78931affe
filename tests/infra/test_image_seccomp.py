"""The system call profile: what it allows, and what it must never allow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from container.ranks import lockdown_bpf
from infra.image import seccomp

# Calls that docker's own profile allows to everybody and a server has no use for.
NOT_NEEDED = {
    *("connect", "sendmmsg", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key"),
    *(
        "request_key",
        "process_vm_readv",
        "ptrace",
        "mknod",
        "mknodat",
        "link",
        "symlink",
        "linkat",
        "symlinkat",
    ),
    *("chown", "fchown", "lchown", "fchownat", "setxattr", "fsetxattr", "personality", "msgget", "semget"),
    *(
        "shmget",
        "mq_open",
        "inotify_init1",
        "fanotify_mark",
        "name_to_handle_at",
        "vmsplice",
        "tee",
        "splice",
    ),
    *("landlock_create_ruleset", "process_madvise", "pidfd_getfd", "pidfd_open", "pidfd_send_signal"),
}
# What docker's own profile refuses to everybody, or gives with a capability only.
REFUSED_BY_DOCKER = {
    *("mount", "umount2", "unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "init_module"),
    *(
        "finit_module",
        "kexec_load",
        "reboot",
        "swapon",
        "pivot_root",
        "chroot",
        "settimeofday",
        "clock_settime",
    ),
    *("sethostname", "iopl", "ioperm", "quotactl", "acct", "open_by_handle_at", "mbind", "set_mempolicy"),
}


def rules_of(name: str) -> list[dict[str, Any]]:
    return [rule for rule in seccomp.profile()["syscalls"] if name in rule["names"]]


def test_the_file_is_the_profile_and_refuses_what_it_does_not_name() -> None:
    assert seccomp.PROFILE.read_text() == seccomp.text()
    assert json.loads(seccomp.text())["defaultAction"] == "SCMP_ACT_ERRNO"


@pytest.mark.parametrize("refused", [NOT_NEEDED, REFUSED_BY_DOCKER], ids=["not needed", "refused by docker"])
def test_nothing_is_allowed_that_a_server_has_no_use_for(refused: set[str]) -> None:
    assert seccomp.allowed() & refused == set()


def test_nothing_is_allowed_that_the_lockdown_refuses_later() -> None:
    refused = {*lockdown_bpf.REFUSED_ALWAYS, *lockdown_bpf.REFUSED_SOCKETS}
    assert seccomp.allowed() & refused == set()
    assert "seccomp" in seccomp.allowed(), "the lockdown could not be installed"


def test_only_sockets_of_three_families_can_be_made_and_nothing_sent_to_an_address() -> None:
    families = [rule["args"] for rule in rules_of("socket")]
    assert sorted(args[0]["value"] for args in families) == [1, 2, 10]
    assert all(len(args) == 1 and args[0]["op"] == "SCMP_CMP_EQ" for args in families)
    (pair,) = rules_of("socketpair")
    assert pair["args"] == [{"index": 0, "value": 1, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]
    (sent,) = rules_of("sendto")
    assert sent["args"] == [{"index": 4, "value": 0, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]


def test_no_namespace_can_be_made() -> None:
    (clone,) = rules_of("clone")
    made = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
    assert clone["args"] == [{"index": 0, "value": made, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    (newer,) = rules_of("clone3")
    assert (newer["action"], newer["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_no_call_is_named_twice_without_a_condition() -> None:
    names = [name for names in seccomp.GROUPS.values() for name in names.split()]
    assert len(names) == len(set(names)) > 150
