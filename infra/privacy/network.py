"""What a network namespace sent: the kernel's own counters, and every packet that passed an interface.

Owns: which counters tell of a connection or datagram that somebody inside began, the reading of packets.
Must not know: containers, what is right or wrong about a number.
Invariant: a packet that was lost on its way to us is counted as lost; nothing is written to disk.

A counter that grows without a route catches what no capture can: an attempt for which no packet was made.
Packets: RFC 791, 8200, 9293, 768; packet(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

# Of /proc/net/snmp and snmp6: what grows when a process inside opens a connection or sends a datagram.
OPENED: Final = ("TcpActiveOpens", "IpOutNoRoutes", "Ip6OutNoRoutes")
SENT: Final = (
    *("UdpOutDatagrams", "UdpLiteOutDatagrams", "Udp6OutDatagrams", "UdpLite6OutDatagrams"),
    *("IcmpOutEchos", "Icmp6OutEchos"),
)
ALL_PACKETS: Final = 3  # ETH_P_ALL
IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
SYN, ACK = 0x02, 0x10
# Router and neighbour discovery and group reports: what a kernel says for itself (RFC 4861, 3810).
KERNELS_OWN: Final = frozenset({*range(133, 138), 143})
DNS_PORT: Final = 53
SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 263, 6, 33
BUFFER_BYTES: Final = 32 * 1024 * 1024
CLONE_NEWNET: Final = 0x40000000
LOOK_S: Final = 0.2


def counters(namespace: Path) -> dict[str, int]:
    """Return the counters of OPENED and SENT of the network namespace `namespace`; needs root."""
    # /proc/net is the reader's own: a program that has entered reads it
    command = ["nsenter", f"--net={namespace}", "cat", "/proc/net/snmp", "/proc/net/snmp6"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    read = parse_counters(said)
    return {name: read.get(name, 0) for name in (*OPENED, *SENT)}


def parse_counters(text: str) -> dict[str, int]:
    """Return name -> value of the text of /proc/net/snmp followed by that of snmp6."""
    found: dict[str, int] = {}
    names: list[str] = []
    for line in text.splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            found[first] = int(rest[0])  # snmp6 has one to a line
        elif names and names[0] == first:
            found |= {first[:-1] + n: int(v) for n, v in zip(names[1:], rest, strict=True)}
            names = []
        else:
            names = [first, *rest]
    return found


@dataclass(frozen=True, slots=True)
class Packet:
    """What is kept of a packet: no content."""

    source: str
    kind: str  # syn, tcp, udp, dns, icmp, other; neighbour: the kernel's own, never a process's
    target: str
    port: int


def read_packet(family: int, data: bytes) -> Packet | None:
    """Return what an IP packet is; None for what is not IP."""
    if family == IPV4 and len(data) >= 20:
        header_bytes = (data[0] & 0x0F) * 4
        protocol, source, target = data[9], data[12:16], data[16:20]
        addresses = socket.inet_ntop(socket.AF_INET, source), socket.inet_ntop(socket.AF_INET, target)
    elif family == IPV6 and len(data) >= 40:
        header_bytes, protocol = 40, data[6]
        if protocol == 0 and len(data) >= 42:  # hop-by-hop options stand before a group report
            header_bytes, protocol = 40 + 8 * (data[41] + 1), data[40]
        source, target = data[8:24], data[24:40]
        addresses = socket.inet_ntop(socket.AF_INET6, source), socket.inet_ntop(socket.AF_INET6, target)
    else:
        return None
    kind, port = _kind(protocol, data[header_bytes:])
    return Packet(addresses[0], kind, addresses[1], port)


def _kind(protocol: int, payload: bytes) -> tuple[str, int]:
    if protocol == TCP and len(payload) >= 14:
        (port,) = struct.unpack_from("!H", payload, 2)
        if port == DNS_PORT:
            return "dns", port
        return ("syn" if payload[13] & (SYN | ACK) == SYN else "tcp"), port
    if protocol == UDP and len(payload) >= 8:
        (port,) = struct.unpack_from("!H", payload, 2)
        return ("dns" if port == DNS_PORT else "udp"), port
    if protocol == ICMP6 and payload and payload[0] in KERNELS_OWN:
        return "neighbour", 0
    return ("icmp" if protocol in (ICMP, ICMP6) else "other"), 0


class Capture:
    """Counts the packets of one interface, or of all of a namespace; a context. Needs root.

    `namespace` None is the caller's own; `interface` "" is all of them. Raises OSError.
    """

    def __init__(self, namespace: Path | None = None, interface: str = "") -> None:
        self._namespace, self._interface = namespace, interface
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._ready, self._ends = threading.Event(), threading.Event()
        self._failed: OSError | None = None
        self.packets: Counter[Packet] = Counter()
        self.lost = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            opened = self._open()
        except OSError as error:
            self._failed = error
            return
        finally:
            self._ready.set()
        with opened:
            # what has arrived is read to its end, also after the last look at the clock
            while not self._ends.is_set():
                self._drain(opened)
            self._drain(opened)
            _, self.lost = struct.unpack("II", opened.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))

    def _drain(self, opened: socket.socket) -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                try:
                    data, (_, family, *_rest) = opened.recvfrom(256)
                except OSError as error:
                    if isinstance(error, TimeoutError):
                        raise
                    continue  # the interface was down for a moment, which a socket is told once
                packet = read_packet(family, data)
                if packet is not None:
                    self.packets[packet] += 1

    def _open(self) -> socket.socket:
        if self._namespace is not None:  # this thread alone enters
            libc = ctypes.CDLL(None, use_errno=True)
            fd = os.open(self._namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if libc.setns(fd, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "the network cannot be entered")
            finally:
                os.close(fd)
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL_PACKETS))
        opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        if self._interface:
            opened.bind((self._interface, ALL_PACKETS))
        opened.settimeout(LOOK_S)
        return opened
