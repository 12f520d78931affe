"""Clients that stall, leave or read slowly (rows A15 to A19, bars B17 and B18)."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from pathlib import Path

from tests.sagemaker_entry.harness import Server, post, read_all, status_of, wait_until


def slow(stream: bool, tokens: int = 2000) -> bytes:
    parameters = {"max_new_tokens": tokens}
    return json.dumps({"inputs": "abc wait=20 ", "parameters": parameters, "stream": stream}).encode()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def cancelled_within(server: Server, client: socket.socket, *, by_reset: bool) -> float:
    """Leave and return how long the engine went on."""
    wait_until(lambda: server.engine["running"] == 1, what="the running request")
    if by_reset:
        reset(client)
    else:
        client.close()
    return wait_until(lambda: server.engine["running"] == 0, what="the cancel")


def test_the_engine_stops_when_a_client_leaves_before_its_answer(server: Server) -> None:
    for by_reset in (False, True):
        client = server.connect()
        client.sendall(post("/invocations", slow(stream=False)))
        # the watch looks every 50 ms; the fake engine writes its status within a step of 20 ms
        assert cancelled_within(server, client, by_reset=by_reset) < 0.25


def test_the_engine_stops_when_a_client_leaves_in_mid_stream(server: Server) -> None:
    for by_reset in (False, True):
        client = server.connect()
        client.sendall(post("/invocations", slow(stream=True)))
        assert b"200 OK" in client.recv(1000)
        assert cancelled_within(server, client, by_reset=by_reset) < 0.25


def test_the_engine_stops_when_a_client_that_had_pipelined_leaves(server: Server) -> None:
    client = server.connect()
    client.sendall(
        post("/invocations", slow(stream=False), close=False) + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert cancelled_within(server, client, by_reset=False) < 0.25


def test_a_storm_of_clients_that_send_and_leave_leaves_nothing_behind(server: Server) -> None:
    accepted = server.metric("strongroom_requests_accepted_total")
    for i in range(60):
        client = server.connect()
        client.sendall(post("/invocations", slow(stream=i % 2 == 0)))
        if i % 3 == 0:
            time.sleep(0.02)
        reset(client)
    wait_until(lambda: server.metric("strongroom_requests_in_flight") == 0, 10, "an idle front")
    wait_until(lambda: server.engine["running"] == 0, 5, "an idle engine")
    cancelled = server.metric("strongroom_requests_cancelled_total")
    assert cancelled > 0
    assert server.metric("strongroom_requests_accepted_total") - accepted <= 60
    ended = sum(
        server.metric(f"strongroom_requests_{how}_total") for how in ("completed", "failed", "cancelled")
    )
    assert server.metric("strongroom_requests_accepted_total") == ended


def test_stalled_sockets_are_closed_by_their_deadlines_and_ping_stays_fast(server: Server) -> None:
    headers = [server.connect() for _ in range(100)]
    bodies = [server.connect() for _ in range(100)]
    began = time.monotonic()
    for client in headers:
        client.sendall(b"GET /ping HTTP/1.1\r\nX-A: ")
    for client in bodies:
        client.sendall(post("/invocations", b"{", "Content-Length: 100"))
    times: list[float] = []
    closed: dict[str, list[float]] = {"header": [], "body": []}
    replies: list[int] = []

    def watch(kind: str, clients: list[socket.socket]) -> None:
        for client in clients:
            client.settimeout(20)
            reply = read_all(client)
            closed[kind].append(time.monotonic() - began)
            if kind == "body":
                replies.append(status_of(reply))
            client.close()

    watchers = [threading.Thread(target=watch, args=pair) for pair in (("header", headers), ("body", bodies))]
    for watcher in watchers:
        watcher.start()
    while time.monotonic() - began < 7:
        start = time.monotonic()
        assert server.ping() == 200
        times.append(time.monotonic() - start)
        time.sleep(0.02)
    for watcher in watchers:
        watcher.join(25)
    assert sorted(times)[int(len(times) * 0.99) - 1] < 0.5  # the bar is 0.2 s on a machine of its own
    assert min(closed["header"]) > 4.5 and max(closed["header"]) < 8
    # one byte and then nothing: below 1 KiB/s once the grace of 5 s is over
    assert min(closed["body"]) > 4.5 and max(closed["body"]) < 9
    assert set(replies) == {408}


def test_a_body_that_trickles_in_is_given_up(server: Server) -> None:
    with server.connect() as client:
        client.settimeout(0.25)
        client.sendall(post("/invocations", b"", "Content-Length: 1000"))
        began, reply = time.monotonic(), b""
        while not reply and time.monotonic() - began < 20:
            try:
                client.sendall(b" ")
                reply = client.recv(1000)
            except TimeoutError:
                continue
        assert status_of(reply) == 408
        assert time.monotonic() - began < 8


def spoken(server: Server) -> socket.socket:
    """Return a connection that is idle after a request: the kernel keeps one that never spoke."""
    client = server.connect()
    client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    return client


def test_a_flood_of_idle_connections_costs_the_oldest_idle_ones_and_never_ping(tmp_path: Path) -> None:
    with Server(tmp_path, nofile=128, STRONGROOM_WORKERS="1") as server:
        busy = server.connect()
        busy.sendall(post("/invocations", slow(stream=False, tokens=50)))
        wait_until(lambda: server.engine["running"] == 1, what="the running request")
        silent = [server.connect() for _ in range(200)]
        flood = [spoken(server) for _ in range(200)]
        for _ in range(10):
            assert server.ping() == 200
        assert server.metric("strongroom_connections_open") <= 128 * 0.8
        oldest, newest = flood[0], flood[-1]
        oldest.settimeout(2)
        assert oldest.recv(1) == b"", "the oldest idle connection is still open"
        newest.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status_of(read_all(newest)) == 200
        assert status_of(read_all(busy)) == 200, "a running request was given up for an idle connection"
        for client in [busy, *silent, *flood]:
            client.close()
