"""The egress lockdown: each way out is seen refused, each call the product needs is seen to work.

The same process does the same things locked and unlocked, so that a refusal of the machine's own is not taken
for ours.
"""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

from container.ranks import lockdown, lockdown_bpf
from container.ranks.lockdown_bpf import Scope

# What a machine refuses to anybody without rights, or by its own filter, says nothing about ours.
MAY_BE_REFUSED_ANYWAY = {"raw", "packet", "io_uring", "trace", "vsock", "udp over version 6"}


def run(program: str, *arguments: str, keep: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        pass_fds=keep,
    )


def outcomes(when: str) -> dict[str, dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        command = [sys.executable, "-m", "tests.ranks.lockdown_process", when, str(fd)]
        with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with socket.create_connection(listener.getsockname(), timeout=20) as client:
                client.sendall(b"hello")
                answer = b""
                while part := client.recv(100):
                    answer += part
            assert answer == b"by send by sendmsg"
            said: dict[str, dict[str, str]] = json.loads(process.stdout.readline())
    return said


@pytest.fixture(scope="module")
def unlocked() -> dict[str, dict[str, str]]:
    return outcomes("open")


@pytest.fixture(scope="module")
def locked() -> dict[str, dict[str, str]]:
    return outcomes("locked")


def test_every_way_out_is_refused(locked: dict[str, dict[str, str]]) -> None:
    assert {name for name, result in locked["out"].items() if result != "EPERM"} == set()


def test_without_the_lockdown_the_same_ways_are_open(unlocked: dict[str, dict[str, str]]) -> None:
    refused = {name for name, result in unlocked["out"].items() if result == "EPERM"}
    assert refused <= MAY_BE_REFUSED_ANYWAY
    for name in ("tcp", "udp", "connect", "unix connect", "sendto", "datagram pair", "child"):
        assert unlocked["out"][name] == "done", name
    for name in ("sendto that connects", "sendmsg that connects"):
        assert unlocked["out"][name] in ("done", "EOPNOTSUPP"), name  # the kernel's setting for fast open


@pytest.mark.parametrize("when", ["unlocked", "locked"])
def test_everything_the_product_needs_works(when: str, request: pytest.FixtureRequest) -> None:
    assert set(request.getfixturevalue(when)["needed"].values()) == {"done"}


def test_the_proof_names_what_is_open_and_nothing_once_it_holds() -> None:
    program = (
        "from container.ranks.lockdown import hold, permitted\n"
        "before = len(permitted())\n"
        "hold()\nhold()\n"
        "print(before, permitted(), open('/proc/self/status').read().count('Seccomp_filters:\\t1'))\n"
    )
    before, after, filters = run(program).stdout.split()
    assert int(before) >= 15
    assert after == "[]"
    assert filters == "1", "a process that is locked took another filter"


def test_a_child_that_inherited_the_lockdown_only_proves_it() -> None:
    program = (
        "import subprocess, sys\nfrom container.ranks.lockdown import hold\nhold()\n"
        "inner = ('from container.ranks import lockdown\\nlockdown._install = None\\nlockdown.hold()\\n'\n"
        '         \'print(open("/proc/self/status").read().count("NoNewPrivs:\\\\t1"))\')\n'
        "print(subprocess.run([sys.executable, '-c', inner], capture_output=True, text=True).stdout)\n"
    )
    assert run(program).stdout.split() == ["1"]


@pytest.mark.parametrize(
    ("opened", "kept", "refused"),
    [
        ("s.socket()", "", "AF_INET"),
        ("s.socket(s.AF_INET6)", "", "AF_INET6"),
        ("s.socket(type=s.SOCK_DGRAM)", "", "AF_INET"),
        ("s.socket(s.AF_NETLINK, s.SOCK_RAW)", "", "AF_NETLINK"),
        ("s.create_server(('127.0.0.1', 0))", "", "AF_INET"),
        ("s.create_server(('127.0.0.1', 0))", "keep=[x.fileno()]", None),
        ("s.create_server(('127.0.0.1', 0))", "loopback=True", None),
        (
            "[a := s.create_server(('127.0.0.1', 0)), s.create_connection(a.getsockname())]",
            "loopback=True",
            None,
        ),
        ("s.create_server(('0.0.0.0', 0))", "loopback=True", "AF_INET"),
        ("s.socket(type=s.SOCK_DGRAM)", "loopback=True", "AF_INET"),
        ("s.socketpair()[0]", "", None),
    ],
)
def test_a_socket_that_was_open_before_is_no_way_round_the_lock(
    opened: str, kept: str, refused: str | None
) -> None:
    program = (
        "import socket as s\nfrom container.ranks.lockdown import LockdownFailed, hold, permitted\n"
        f"x = {opened}\n"
        f"try:\n    hold({kept})\n    print('locked')\nexcept LockdownFailed as error:\n    print(error)\n"
    )
    said = run(program).stdout.strip()
    assert said == ("locked" if refused is None else f"1 sockets are open already: {refused}")


def test_a_parent_of_ranks_that_connect_keeps_sockets_and_nothing_else_and_its_child_can_lock_fully() -> None:
    program = (
        "import socket, subprocess, sys\n"
        "from container.ranks.lockdown import hold, permitted\n"
        "from container.ranks.lockdown_bpf import Scope\n"
        "hold(Scope.KEEPS_SOCKETS)\n"
        "with socket.create_server(('127.0.0.1', 0)) as listener:\n"
        "    socket.create_connection(listener.getsockname()).close()\n"
        "inner = 'from container.ranks.lockdown import hold, permitted\\nhold()\\nprint(permitted())'\n"
        "child = subprocess.run([sys.executable, '-c', inner], capture_output=True, text=True)\n"
        "print(permitted(Scope.KEEPS_SOCKETS), 'connect' in permitted(), child.stdout.strip())\n"
    )
    assert run(program).stdout.strip() == "[] True []"


@pytest.mark.parametrize("name", [*lockdown._SOCKETS_REFUSED, *lockdown._ALWAYS_REFUSED])
def test_a_filter_that_lacks_one_rule_does_not_hold(name: str) -> None:
    """Every rule of the self-test is red once the filter does not refuse what it tries."""
    program = (
        "import sys\nfrom container.ranks import lockdown\n"
        "name = sys.argv[1]\n"
        "real = lockdown._refused\n"
        "tables = (lockdown._SOCKETS_REFUSED, lockdown._ALWAYS_REFUSED)\n"
        "call, *arguments = next(t[name] for t in tables if name in t)\n"
        "lockdown._refused = lambda p, c, a: (c, a) != (call, arguments) and real(p, c, a)\n"
        "try:\n    lockdown.hold()\nexcept lockdown.LockdownFailed as error:\n    print(error)\n"
    )
    assert run(program, name).stdout.strip() == f"not refused: {name}"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("lockdown._install = lambda *_: None", "not refused: io_uring, "),
        ("lockdown.PROCESSORS = {}", "there are no rules for `"),
        ("lockdown._channels_work = lambda: False", "sockets within the machine are refused too"),
        ("lockdown.program = lambda *_: b'\\0' * 8", "the kernel takes no filter: EINVAL"),
    ],
)
def test_a_lockdown_that_does_not_hold_is_never_taken_for_one(broken: str, said: str) -> None:
    program = (
        f"from container.ranks import lockdown\n{broken}\n"
        "try:\n    lockdown.hold()\nexcept lockdown.LockdownFailed as error:\n    print(error)\n"
    )
    assert run(program).stdout.startswith(said)


def test_a_kernel_that_does_not_know_the_newer_flag_is_asked_without_it() -> None:
    program = (
        "from container.ranks import lockdown\nlockdown.SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1 << 30\n"
        "lockdown.hold()\nprint(lockdown.permitted())\n"
    )
    assert run(program).stdout.strip() == "[]"


def test_a_thread_with_a_filter_of_its_own_stops_the_lock() -> None:
    program = (
        "import ctypes, threading\nfrom container.ranks import lockdown\n"
        "from container.ranks.lockdown_bpf import PROCESSORS, Scope, program\nimport os\n"
        "p = PROCESSORS[os.uname().machine]\nready, end = threading.Event(), threading.Event()\n"
        "def alone():\n"
        "    libc = ctypes.CDLL(None)\n    libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0)\n"
        "    code = program(p, Scope.KEEPS_SOCKETS)\n"
        "    told = lockdown._Program(len(code) // 8, code)\n"
        "    assert libc.syscall(p.numbers['seccomp'], 1, 0, ctypes.byref(told)) == 0\n"
        "    ready.set(); end.wait()\n"
        "t = threading.Thread(target=alone); t.start(); ready.wait()\n"
        "try:\n    lockdown.hold()\nexcept lockdown.LockdownFailed as error:\n    print(error)\nend.set()\n"
    )
    assert run(program).stdout.strip() == "a thread has a filter of its own"


def test_torch_its_threads_and_the_native_operators_compute_under_the_lock() -> None:
    program = (
        "from container.ranks.lockdown import hold, permitted\nhold()\n"
        "import torch\nfrom container.kernels import operators\n"
        "torch.set_num_threads(2)\na = torch.randn(300, 300)\n"
        "assert torch.allclose((a @ a.inverse()), torch.eye(300), atol=1e-2)\n"
        "print(permitted())\n"
    )
    result = run(program)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_gevent_serves_under_the_lock() -> None:
    program = (
        "from container.ranks.lockdown import hold\nfrom gevent import monkey\nmonkey.patch_all()\nhold()\n"
        "import gevent, socket\none, other = socket.socketpair()\n"
        "heard = gevent.spawn(other.recv, 5)\ngevent.sleep(0.01)\none.sendall(b'hello')\n"
        "print(heard.get(timeout=5), gevent.get_hub().threadpool.apply(len, (b'abc',)))\n"
    )
    assert run(program).stdout.strip() == "b'hello' 3"


def test_the_processor_s_other_system_call_table_ends_the_process() -> None:
    """A filter sees the architecture of the call: 32-bit numbers mean other calls and are not judged."""
    assert simulate("x86_64", Scope.FULL, 41, arch=0x40000003) == lockdown_bpf.KILL
    assert simulate("aarch64", Scope.FULL, 198, arch=0x40000028) == lockdown_bpf.KILL
    assert simulate("x86_64", Scope.FULL, 41, arch=0xC00000B7) == lockdown_bpf.KILL


def simulate(
    machine: str, scope: Scope, number: int, arguments: Sequence[int] = (), arch: int | None = None
) -> int:
    """Run the program as the kernel would and return its verdict."""
    processor = lockdown_bpf.PROCESSORS[machine]
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = number.to_bytes(4, "little") + (processor.audit if arch is None else arch).to_bytes(4, "little")
    data += bytes(8) + b"".join((one % 2**64).to_bytes(8, "little") for one in padded)
    code = [*lockdown_bpf.INSTRUCTION.iter_unpack(lockdown_bpf.program(processor, scope))]
    at, held = 0, 0
    while True:
        what, then, otherwise, constant = code[at]
        at += 1
        if what == 0x20:
            held = int.from_bytes(data[constant : constant + 4], "little")
        elif what == 0x54:
            held &= constant
        elif what == 0x06:
            return int(constant)
        else:
            met = {0x15: held == constant, 0x35: held >= constant, 0x45: bool(held & constant)}[what]
            at += then if met else otherwise


ALLOW, REFUSE = lockdown_bpf.ALLOW, lockdown_bpf.REFUSE
HIGH = 1 << 40
FAST = lockdown_bpf.MSG_FASTOPEN
JUDGED: list[tuple[str, list[int], int]] = [
    ("socket", [1, 1], ALLOW),
    ("socket", [1, 5 | 0o2004000], ALLOW),  # with SOCK_CLOEXEC and SOCK_NONBLOCK
    ("socket", [1 | HIGH, 1], ALLOW),  # the kernel takes 32 bits of it as well
    ("socket", [1, 2], REFUSE),
    ("socket", [1, 3], REFUSE),
    *[("socket", [family, 1], REFUSE) for family in range(46) if family != 1],
    ("socketpair", [1, 1], ALLOW),
    ("socketpair", [1, 2 | 0o2000000], REFUSE),
    ("socketpair", [30, 5], REFUSE),  # TIPC
    ("sendto", [9, 1, 2, 0, 0, 0], ALLOW),
    ("sendto", [9, 1, 2, 0x4000, 0, 16], ALLOW),
    ("sendto", [9, 1, 2, 0, 1, 0], REFUSE),
    ("sendto", [9, 1, 2, 0, HIGH, 0], REFUSE),
    ("sendto", [9, 1, 2, FAST, 0, 0], REFUSE),
    ("sendmsg", [9, 1, 0x40], ALLOW),
    ("sendmsg", [9, 1, FAST | 0x40], REFUSE),
    ("connect", [9, 1, 16], REFUSE),
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("name", "arguments", "verdict"), JUDGED)
def test_calls_are_judged_by_their_arguments(
    machine: str, name: str, arguments: list[int], verdict: int
) -> None:
    number = lockdown_bpf.PROCESSORS[machine].numbers[name]
    assert simulate(machine, Scope.FULL, number, arguments) == verdict
    assert simulate(machine, Scope.KEEPS_SOCKETS, number, arguments) == ALLOW


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("scope", Scope)
def test_only_what_is_named_is_refused(machine: str, scope: Scope) -> None:
    numbers = lockdown_bpf.PROCESSORS[machine].numbers
    named = {numbers[name] for name in lockdown_bpf.REFUSED_ALWAYS}
    if scope is Scope.FULL:
        named |= {numbers[name] for name in (*lockdown_bpf.REFUSED_SOCKETS, "socket", "socketpair")}
    refused = {number for number in range(600) if simulate(machine, scope, number) == REFUSE}
    assert refused == named


def test_the_second_table_of_an_x86_processor_is_refused_whole() -> None:
    for number in (0x40000000, 0x40000029, 0x7FFFFFFF, 0xFFFFFFFF):
        assert simulate("x86_64", Scope.KEEPS_SOCKETS, number) == REFUSE
    assert simulate("x86_64", Scope.FULL, 0x3FFFFFFF) == ALLOW


def test_the_verdicts_are_the_kernel_s_words_and_the_program_fits() -> None:
    assert (lockdown_bpf.ALLOW, lockdown_bpf.KILL) == (0x7FFF0000, 0x80000000)
    assert (lockdown_bpf.REFUSE & 0xFFFF0000, lockdown_bpf.REFUSE & 0xFFFF) == (0x00050000, errno.EPERM)
    for processor in lockdown_bpf.PROCESSORS.values():
        program = lockdown_bpf.program(processor, Scope.FULL)
        assert len(program) // lockdown_bpf.INSTRUCTION.size < 80  # of 4096
        assert len(set(processor.numbers.values())) == len(processor.numbers)
