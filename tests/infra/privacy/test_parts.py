"""The parts of the evidence pack: the plan, the counters, packets, traces, and the search for canaries."""

from __future__ import annotations

import base64
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from container.ranks import lockdown
from container.ranks.lockdown_bpf import Scope
from infra.privacy import kernel, network, plan, search
from infra.privacy.network import Packet

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can watch")


def test_every_canary_stands_in_one_call_and_every_kind_carries_some() -> None:
    made = plan.make(1000, 500)
    assert len(made.calls) == 1000 and len(set(made.canaries)) == 500
    for call in made.calls:
        text = f"{call.path} {dict(call.headers)}".encode() + call.body
        held = set(re.findall(made.mark.encode() + rb"\d{4}", text))
        assert held == ({call.canary.encode()} if call.canary else set()), call.kind
    carried = Counter(call.kind for call in made.calls if call.canary)
    assert set(carried) == set(plan.KINDS) and min(carried.values()) >= 20
    assert plan.make(1000, 500).mark != made.mark


@pytest.mark.parametrize(("calls", "canaries"), [(0, 0), (10, 11), (10, 0), (plan.MAX_CALLS + 1, 1)])
def test_a_plan_has_bounds(calls: int, canaries: int) -> None:
    with pytest.raises(ValueError, match="a plan has"):
        plan.make(calls, canaries)


SNMP = (
    "Ip: Forwarding OutNoRoutes\nIp: 1 4\nTcp: ActiveOpens PassiveOpens\nTcp: 2 9\n"
    "Udp: OutDatagrams\nUdp: 3\nUdp6OutDatagrams   \t7\n"
)


def test_counters_are_read_in_both_of_their_forms() -> None:
    assert network.parse_counters(SNMP) == {
        "IpForwarding": 1,
        "IpOutNoRoutes": 4,
        "TcpActiveOpens": 2,
        "TcpPassiveOpens": 9,
        "UdpOutDatagrams": 3,
        "Udp6OutDatagrams": 7,
    }


def ipv4(protocol: int, payload: bytes) -> bytes:
    addresses = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.9")
    return bytes([0x45]) + bytes(8) + bytes([protocol, 0, 0]) + addresses + payload


def ipv6(following: int, payload: bytes) -> bytes:
    address = socket.inet_pton(socket.AF_INET6, "fe80::1")
    return b"\x60" + bytes(5) + bytes([following, 64]) + address * 2 + payload


def tcp(port: int, flags: int) -> bytes:
    return struct.pack("!HH8xBB", 5000, port, 0x50, flags)


def udp(port: int) -> bytes:
    return struct.pack("!HHHH", 5000, port, 8, 0)


@pytest.mark.parametrize(
    ("packet", "kind", "port"),
    [
        (ipv4(6, tcp(443, 0x02)), "syn", 443),
        (ipv4(6, tcp(443, 0x12)), "tcp", 443),
        (ipv4(6, tcp(53, 0x02)), "dns", 53),
        (ipv4(17, udp(9)), "udp", 9),
        (ipv4(17, udp(53)), "dns", 53),
        (ipv4(1, b"\x08\x00"), "icmp", 0),
        (ipv4(132, b""), "other", 0),
        (ipv4(6, b""), "other", 0),
        (ipv6(6, tcp(80, 0x02)), "syn", 80),
        (ipv6(58, b"\x87\x00"), "neighbour", 0),
        (ipv6(58, b"\x80\x00"), "icmp", 0),
        (ipv6(0, b"\x3a\x00" + bytes(6) + b"\x8f\x00"), "neighbour", 0),
    ],
)
def test_a_packet_is_known_by_what_it_begins(packet: bytes, kind: str, port: int) -> None:
    family = network.IPV4 if packet[0] >> 4 == 4 else network.IPV6
    read = network.read_packet(family, packet)
    assert read is not None and (read.kind, read.port) == (kind, port)


def test_what_is_not_ip_is_no_packet() -> None:
    assert network.read_packet(network.ARP, bytes(40)) is None
    assert network.read_packet(network.IPV4, b"\x45") is None


TRACE = """# tracer: nop
 runc-70 [000] .....  1.0: sys_connect(fd: 3, uservaddr: 1, addrlen: 2)
 bash-60 [000] .....  1.0: sched_process_fork: comm=a b pid=60 child_comm=bash child_pid=70
 python-70 [000] .....  1.1: sched_process_exec: filename=/opt/x y pid=70 old_pid=70
 python-70 [000] .....  1.2: sys_socket(family: 2, type: 0x80001, protocol: 0)
 python-70 [001] .....  1.3: sched_process_fork: comm=python pid=70 child_comm=py child_pid=71
 my - name-71 [001] .....  1.4: sys_socket(family: 1, type: 0x80801, protocol: 0)
 my - name-71 [001] .....  1.4: sys_connect -> 0xffffffffffffffff
 python-71 [001] .....  1.5: sys_socket -> 0xffffffffffffffff
 python-71 [001] .....  1.5: sys_connect -> 0xffffffffffffff91
 other-99 [001] .....  1.6: sys_connect -> 0xffffffffffffffff
"""


def test_a_trace_tells_of_one_tree_from_its_first_program_on() -> None:
    asked = kernel.read(TRACE.splitlines(), 70)
    assert asked.processes == 2
    assert asked.made == {"socket": 1, kernel.WITHIN: 1}
    assert asked.refused == {"connect": 1, "socket": 1}
    assert asked.attempts(port=True) == {"socket, refused": 1}, "the connect is the look-up's"
    assert asked.look_ups(port=True) == 1


def rounds(refused: int, made: int, **more: int) -> kernel.Asked:
    """Return what whole rounds of the self-test leave in a trace, and more."""
    sees = {call: count * refused for call, count in kernel.REFUSED_A_ROUND.items()}
    lets = {call: count * made for call, count in kernel.MADE_A_ROUND.items()}
    lets |= {kernel.ROUND: made, kernel.WITHIN: made + 1}  # and the listener
    for name, count in more.items():
        call, _, how = name.rpartition("_")
        into = sees if how == "refused" else lets
        into[call] += count
    return kernel.Asked(3, lets, sees | {kernel.ROUND: refused})


def test_the_self_test_alone_is_no_attempt_and_anything_beyond_it_is_one() -> None:
    assert rounds(7, 1).attempts(port=False) == {}
    for call in kernel.REFUSED_A_ROUND:
        assert rounds(7, 1, **{f"{call}_refused": 1}).attempts(port=False), call
    for call in kernel.MADE_A_ROUND:
        assert rounds(7, 1, **{f"{call}_made": 1}).attempts(port=False), call


def test_the_arithmetic_is_that_of_the_lockdowns_own_test() -> None:
    tried = lockdown._SOCKETS_REFUSED
    calls = Counter(call for call, *_ in tried.values())
    assert dict(calls) == {**kernel.REFUSED_A_ROUND, kernel.ROUND: 1}
    within = [1 for call, family, *_ in tried.values() if call == "socket" and family == socket.AF_UNIX]
    assert len(within) == kernel.WITHIN_A_ROUND
    assert calls["socket"] - len(within) == kernel.MADE_A_ROUND["socket"]
    with_address = [one for one in tried.values() if one[0] == "sendto" and one[5]]
    assert len(with_address) == kernel.MADE_A_ROUND["sendto"]
    assert lockdown.permitted(Scope.FULL), "this process is locked"


@AS_ROOT
def test_a_real_trace_sees_a_child_that_connects() -> None:
    if not kernel.available():
        pytest.skip("this kernel does not tell of system calls")
    program = "import socket; s = socket.socket(); s.connect_ex(('127.0.0.1', 9)); input()"
    with kernel.Trace() as trace:
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            child.communicate(b"\n")
            asked = trace.asked(child.pid)
        folder = trace._folder
    assert asked.made["connect"] == 1 and asked.made["socket"] == 1 and asked.lost == 0
    assert not folder.exists()


@pytest.mark.parametrize("before", range(3))
def test_a_canary_is_found_in_every_form(before: int) -> None:
    mark = plan.make(2, 1).mark
    looked = search.Search(mark)
    canary = f"{mark}0007".encode()
    text = b"x" * before + canary + b"yz"
    assert looked.bytes("", text).numbers == {"0007"}
    forms = [base64.b64encode(text), text.hex().encode(), text[::-1], text.decode().encode("utf-16-le")]
    forms += [text.hex().upper().encode(), text.decode().encode("utf-32-le")]
    for form in forms:
        found = looked.bytes("", form)
        assert found and found.encoded and not found.numbers, form
    assert not looked.bytes("", b"zq0000" + b"x" * 50)


def test_a_canary_is_found_in_a_file_and_in_its_name(tmp_path: Path) -> None:
    looked = search.Search("zq0123456789ab")
    (tmp_path / "zq0123456789ab0001").write_text("")
    (tmp_path / "b").write_text("zq0123456789ab0002")
    (tmp_path / "c").write_text("nothing")
    found = [one.numbers for one in looked.files(sorted(tmp_path.iterdir()))]
    assert [set(one) for one in found] == [{"0002"}, set(), {"0001"}]


@AS_ROOT
def test_a_canary_is_found_in_the_memory_of_a_process() -> None:
    mark = f"zq{secrets.token_hex(6)}"
    program = "a = bytes.fromhex(input()) * 2; print('', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(f"{mark}0003".encode().hex().encode() + b"\n")
        child.stdin.flush()
        child.stdout.readline()
        (found,) = search.Search(mark).memory([child.pid])
        child.communicate(b"\n")
    assert "0003" in found.numbers  # what was freed may be overwritten in part


@AS_ROOT
def test_packets_are_seen_and_of_a_quiet_interface_none() -> None:
    with network.Capture(interface="lo") as capture, socket.socket(type=socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", 4747))
    mine = {one: count for one, count in capture.packets.items() if one.port == 4747}
    assert set(mine) == {Packet("127.0.0.1", "udp", "127.0.0.1", 4747)} and capture.lost == 0
