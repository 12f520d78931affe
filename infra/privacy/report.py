"""The evidence as an auditor reads it: one JSON document, and the same as Markdown.

Owns: form and words. Must not know: how anything was observed.
Invariant: the Markdown says nothing that the JSON does not hold; no content of any call is in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from infra.image.checks.table import Result
from infra.privacy.calling import tally
from infra.privacy.detectors import DETECTORS, MEMORY_SHARE, TABLE, Observed, canaries_left, sorted_packets

KIND: Final = "strongroom privacy evidence 1"
HEAD: Final = """# Nothing leaves, nothing stays: evidence

Made by `scripts/prove-privacy`, which starts the image named below, calls it, ends it, and watches it from
outside from before its first instruction to after its last. Anybody with the image can make it again.
"""
LIMITS: Final = """
## What this does not show

- It shows these runs on this host. The lockdown (detector 6) is what holds in every other run: the kernel
  refuses each process every way out once it listens.
- Before the lockdown holds, start-up code runs unlocked. Detectors 2 to 5 cover that window too.
- An internal network of Docker's still reaches the host's own addresses; the second run has no network.
- Root of the host can read everything a container holds. What was asked is not wiped from the memory of the
  processes; how much of it was left is measured above, beside its bar, and judged by no detector.
- A canary in another form than those looked for (plain, hexadecimal, base64, UTF-16, UTF-32, backwards) would
  not be found; the packet, connection or changed file that carries it would.
"""


def document(
    facts: Mapping[str, Any], runs: Mapping[str, Observed], commands: Sequence[str]
) -> dict[str, Any]:
    """Return the whole evidence."""
    judged = {name: TABLE.run(seen) for name, seen in runs.items()}
    passed = all(result.passed for results in judged.values() for result in results)
    return {
        "kind": KIND,
        "ok": bool(runs) and passed,
        **facts,
        "commands": list(commands),
        "runs": {name: _run(seen, judged[name]) for name, seen in runs.items()},
    }


def markdown(evidence: Mapping[str, Any]) -> str:
    """Return the evidence for a person."""
    verdict = "**nothing was found**" if evidence["ok"] else "**something was found: see below**"
    lines = [HEAD, f"Result: {verdict}. {evidence['date']}", "", "| what | |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in evidence["subject"].items()]
    lines += [f"| {name} | {value} |" for name, value in evidence["host"].items()]
    for name, run in evidence["runs"].items():
        lines += ["", f"## {name}", "", _sentence(run), "", "| # | detector | |", "|---|---|---|"]
        for one in run["detectors"]:
            said = "nothing" if one["passed"] else "**" + "; ".join(one["findings"][:8]) + "**"
            lines.append(f"| {one['number']} | {one['title']} | {said} |")
        lines += ["", f"Counters: {_pairs(run['counters'])}.", "", f"Packets: {_packets(run['packets'])}."]
        if run["system_calls"] is not None:
            calls = run["system_calls"]
            lines += ["", f"System calls refused: {_pairs(calls['refused'])}; made: {_pairs(calls['made'])}."]
            lines += [f"Name service daemons looked for within the machine: {calls['look_ups']}."]
        lines += ["", "| call | ends |", "|---|---|"]
        lines += [f"| {kind} | {_pairs(ends)} |" for kind, ends in run["calls"].items()]
    lines += [LIMITS, "## Made with", "", "```sh", *evidence["commands"], "```", ""]
    return "\n".join(lines)


def _run(seen: Observed, results: Sequence[Result]) -> dict[str, Any]:
    assert len(results) == DETECTORS, "every detector judges every run"
    asked = seen.asked
    return {
        "ok": all(result.passed for result in results),
        "detectors": [
            {
                "number": result.number,
                "title": result.title,
                "passed": result.passed,
                "findings": list(result.findings or ()),
            }
            for result in results
        ],
        "made": len(seen.outcomes),
        "canaries": seen.canaries,
        "calls": tally(seen.outcomes),
        "counters": dict(seen.counters),
        "packets": [
            {"kind": one.kind, "from": one.source, "to": one.target, "count": count}
            for one, count in _folded(seen)
        ],
        "system_calls": None
        if asked is None
        else {
            "processes": asked.processes,
            "made": dict(asked.made),
            "refused": dict(asked.refused),
            "look_ups": asked.look_ups(port=seen.port),
        },
        "processes": len(seen.processes),
        "log_bytes": seen.log_bytes,
        "changes": list(seen.changes),
        "memory": {
            "canaries_left": canaries_left(seen),
            "within_bar": canaries_left(seen) <= MEMORY_SHARE * seen.canaries,
            "after_s": round(seen.memory_after_s, 1),
            "by_process": [[one.place, len(one.numbers), one.encoded] for one in seen.memory],
        },
        "exit": seen.exit_code,
    }


def _folded(seen: Observed) -> list[tuple[Any, int]]:
    """Packets of one kind between the same two count together, whatever the client's port was."""
    folded: dict[Any, int] = {}
    for packet, count in seen.packets.items():
        key = type(packet)(packet.source, packet.kind, packet.target, 0)
        folded[key] = folded.get(key, 0) + count
    return sorted_packets(folded)


def _sentence(run: Mapping[str, Any]) -> str:
    memory = run["memory"]
    bar = "within" if memory["within_bar"] else "**over**"
    return (
        f"{run['made']} calls, {run['canaries']} of them with a canary; {run['processes']} processes; "
        f"exit status {run['exit']}; {len(run['changes'])} files changed. In memory {memory['after_s']} s "
        f"after the last call: {memory['canaries_left']} canaries, {bar} the bar of {MEMORY_SHARE:.0%}."
    )


def _pairs(pairs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items()) or "none"


def _packets(packets: Sequence[Mapping[str, Any]]) -> str:
    said = [f"{one['count']} {one['kind']} from {one['from']} to {one['to']}" for one in packets]
    return ", ".join(said) or "none"
