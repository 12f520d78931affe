"""The system call profile that docker is given: stricter than its own, in force from the first instruction.

Owns: which calls a container of ours may make, each group with its reason; the profile's form.
Must not know: Docker, what the lockdown inside refuses later.
Invariant: what is not named is refused; no call of the lockdown's list is named, so connecting is refused
also before the lockdown holds; every call named is one that docker's own profile allows too.

Names: Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; a processor that
lacks one ignores it. Form: https://docs.docker.com/engine/security/seccomp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

PROFILE: Final = Path(__file__).parents[1] / "airgap" / "run" / "seccomp.json"
GROUPS: Final[dict[str, str]] = {
    "files that are open": (
        "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range "
        "dup dup2 dup3 fcntl flock ioctl fstat ftruncate fallocate fadvise64 fsync fdatasync sendfile "
        "copy_file_range fchmod fstatfs getdents getdents64 fchdir pipe pipe2 memfd_create"
    ),
    "files by name": (
        "open openat openat2 stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat "
        "statfs getcwd chdir umask unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir chmod "
        "fchmodat utimensat"
    ),
    "memory": ("brk mmap mprotect munmap mremap madvise mincore msync mlock mlock2 munlock membarrier"),
    "processes and threads": (
        "execve execveat fork vfork exit exit_group wait4 waitid kill tkill tgkill set_tid_address "
        "set_robust_list get_robust_list rseq prctl arch_prctl seccomp futex futex_waitv sched_yield "
        "sched_getaffinity sched_setaffinity sched_getparam sched_getscheduler sched_get_priority_max "
        "sched_get_priority_min getpriority setpriority getcpu getpid getppid gettid getpgid getpgrp "
        "setpgid getsid setsid"
    ),
    "who one is; a start as root gives that up": (
        "getuid geteuid getgid getegid getgroups getresuid getresgid setuid setgid setgroups setresuid "
        "setresgid capget capset"
    ),
    "limits and facts": ("getrlimit setrlimit prlimit64 getrusage sysinfo uname times getrandom"),
    "signals": (
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigsuspend rt_sigpending sigaltstack "
        "signalfd signalfd4 restart_syscall pause alarm setitimer getitimer"
    ),
    "time": (
        "nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time timerfd_create "
        "timerfd_settime timerfd_gettime"
    ),
    "waiting": (
        "epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select "
        "pselect6 eventfd eventfd2"
    ),
    "sockets that are there": (
        "bind listen accept accept4 getsockname getpeername getsockopt setsockopt shutdown recvfrom "
        "recvmsg sendmsg"
    ),
}
FAMILIES: Final = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
# Every flag of clone(2) that makes a namespace: a new one would give rights back.
NAMESPACES: Final = 0x7E020000
ENOSYS: Final = 38


def profile() -> dict[str, Any]:
    """Return the profile as docker reads it."""
    rules: list[dict[str, Any]] = [_allow(names.split()) for names in GROUPS.values()]
    rules += [_allow(["socket"], _compare(0, "EQ", family)) for family in FAMILIES.values()]
    rules += [
        _allow(["socketpair"], _compare(0, "EQ", FAMILIES["AF_UNIX"])),
        _allow(["sendto"], _compare(4, "EQ", 0)),  # without an address, which is send(2)
        _allow(["clone"], _compare(0, "MASKED_EQ", NAMESPACES, 0)),
        # its flags lie behind a pointer; the C library goes on with clone when the call is unknown
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
    ]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [
            {"architecture": name, "subArchitectures": []}
            for name in ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
        ],
        "syscalls": rules,
    }


def text() -> str:
    """Return the profile as the file holds it."""
    return json.dumps(profile(), indent=1) + "\n"


def allowed() -> set[str]:
    """Return every call that is allowed, with or without a condition."""
    return {
        name for rule in profile()["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]
    }


def _allow(names: list[str], *conditions: dict[str, Any]) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ALLOW", "args": list(conditions)}


def _compare(index: int, how: str, value: int, other: int = 0) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": other, "op": f"SCMP_CMP_{how}"}
