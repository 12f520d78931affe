"""One run: a subject is started, called, left alone, ended, and watched all the while.

Owns: the order. Must not know: what an observation proves.
Invariant: the trace and the packets begin before the subject does; counters are read after it has ended.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from infra.image.container import process
from infra.privacy import kernel
from infra.privacy.calling import Outcome, make_all, read_page
from infra.privacy.detectors import Observed
from infra.privacy.network import Capture, Packet, counters
from infra.privacy.plan import DIGITS, ECHOED, Plan
from infra.privacy.search import Found, Search
from infra.privacy.subject import Watched, kept


def watch(watched: Watched, plan: Plan, idle_s: float, say: Callable[[str], None]) -> Observed:
    """Run a subject through `plan` and return what was observed; raises what starting one raises."""
    search = Search(plan.mark)
    with ExitStack() as stack:
        trace = stack.enter_context(kernel.Trace()) if kernel.available() else None
        subject, capture = stack.enter_context(watched)
        descriptor, network = kept(subject.pid)
        stack.callback(os.close, descriptor)
        say(f"healthy; making {len(plan.calls)} calls with {len(plan.canaries)} canaries")
        outcomes = make_all(subject.upstream, plan.calls)
        metrics_status, _, metrics = read_page(subject.upstream, "/metrics")
        lockdown = read_page(subject.upstream, "/ping")[1].get("Strongroom-Lockdown")
        say(f"called; left alone for {idle_s:.0f} s")
        called_s = time.monotonic()
        time.sleep(idle_s)
        pids = subject.pids()
        memory = tuple(search.memory(pids))
        after_s = time.monotonic() - called_s
        processes = tuple(one for pid in pids if (one := process(pid)) is not None)
        files = tuple(found for found in search.files(subject.written()) if found)
        say("ending it")
        exit_code, _ = subject.stop()
        asked = None if trace is None else trace.asked(subject.pid)
        log = subject.log()
        changed = tuple(subject.changes())
        counted = counters(network)
        stack.pop_all().close()  # the capture reads on to its end
    return Observed(
        outcomes=outcomes,
        canaries=len(plan.canaries),
        counters=counted,
        packets=own_packets(capture, subject.address),
        packets_lost=capture.lost,
        asked=asked,
        port=subject.listens,
        lockdown=lockdown,
        processes=processes,
        log=search.bytes("log", log),
        log_bytes=len(log),
        metrics=search.bytes("metrics", metrics),
        metrics_status=metrics_status,
        answers=betrayed(outcomes, search),
        files=files,
        changes=changed,
        memory=memory,
        memory_after_s=after_s,
        exit_code=exit_code,
    )


def own_packets(capture: Capture, address: str | None) -> Counter[Packet]:
    """Return the packets that came from `address`, or all where the network had no other user."""
    chosen = {p: n for p, n in capture.packets.items() if address is None or p.source == address}
    return Counter(chosen)


def betrayed(outcomes: Sequence[Outcome], search: Search) -> tuple[Found, ...]:
    """Return the answers that hold a canary which is not their caller's, or an error that holds any value."""
    found = []
    for outcome in outcomes:
        held = search.bytes(f"answer {outcome.status} to `{outcome.call.kind}`", outcome.reply)
        own = outcome.call.canary
        may = outcome.status < 400 or outcome.call.kind in ECHOED
        mine = frozenset({own[-DIGITS:]}) if own is not None and may else frozenset[str]()
        if held.numbers - mine or held.encoded:
            found.append(Found(held.place, held.numbers - mine, held.encoded))
    return tuple(found)
