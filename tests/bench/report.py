"""From records to a result: medians, ratios, a table for the terminal, a document for the repository.

Owns: what a result holds and how it reads. Must not know: engines, how anything was measured.
Invariant: a median is made of rounds without error only, and says how many, and how many were noisy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import medians, ratios
from tests.bench.machine import plain

Record = dict[str, Any]
# The figure that stands for a workload in plots and comparisons. Rates: more is better.
MAIN = {
    "W1": "decode_tok_s",
    "W2": "prefill_tok_s",
    "W3": "output_tok_s",
    "W4": "output_tok_s",
    "W4s": "output_tok_s",
}
# What else is compared: seconds, less is better.
FIRSTS = {"W1": "first_token_s", "W3": "first_token_p95_s", "W7": "start_s"}
COLUMNS = (
    ("W1", "decode_tok_s", "W1 tok/s"),
    ("W1", "first_token_s", "first s"),
    ("W2", "prefill_tok_s", "W2 tok/s"),
    ("W3", "output_tok_s", "W3 tok/s"),
    ("W3", "latency_p95_s", "p95 s"),
    ("W3", "first_token_p95_s", "first p95 s"),
    ("W4", "output_tok_s", "W4 tok/s"),
    ("W4s", "output_tok_s", "W4 staggered"),
    ("W7", "start_s", "W7 s"),
)


def good(records: Sequence[Record], engine: str, workload: str) -> list[Record]:
    """Return the records with figures of one engine and workload, by round."""
    mine = [r for r in records if (r["engine"], r["workload"]) == (engine, workload) and "figures" in r]
    return sorted(mine, key=lambda r: r["round"])


def summary(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return engine -> workload -> medians over rounds, with `rounds`, `noisy` and the greatest memory."""
    made: dict[str, dict[str, Any]] = {}
    for engine in dict.fromkeys(r["engine"] for r in records):
        for workload in dict.fromkeys(r["workload"] for r in records):
            if rounds := good(records, engine, workload):
                made.setdefault(engine, {})[workload] = {
                    **{k: round(v, 4) for k, v in medians([r["figures"] for r in rounds]).items()},
                    "rounds": len(rounds),
                    "noisy": sum(r.get("noisy", False) for r in rounds),
                    "foreign_share": round(max(r.get("foreign_share", 0.0) for r in rounds), 4),
                    "peak_rss_mib": max(r.get("peak_rss_mib", 0.0) for r in rounds),
                }
    return made


def against(records: Sequence[Record], ours: str, theirs: str) -> dict[str, Any]:
    """Return median, least and greatest ratio over rounds that both have; above 1, `ours` is the better.

    By workload for the main figures (rates), by workload and figure for times, of which the inverse is taken.
    """
    made: dict[str, Any] = {}
    for workload, figure in (*MAIN.items(), *FIRSTS.items()):
        mine = {r["round"]: r["figures"][figure] for r in good(records, ours, workload)}
        other = {r["round"]: r["figures"][figure] for r in good(records, theirs, workload)}
        shared = sorted(mine.keys() & other.keys())
        pairs = [(mine[n], other[n]) for n in shared if math.isfinite(mine[n]) and math.isfinite(other[n])]
        if pairs:
            rate = figure.endswith("_tok_s")
            first, second = (0, 1) if rate else (1, 0)
            middle, least, most = ratios([p[first] for p in pairs], [p[second] for p in pairs])
            made[workload if rate else f"{workload} {figure}"] = {
                "ratio": round(middle, 4),
                "least": round(least, 4),
                "most": round(most, 4),
                "rounds": len(pairs),
            }
    return made


def table(done: dict[str, dict[str, Any]], told: dict[str, dict[str, Any]]) -> str:
    """Return one line per engine: main figures, highest memory, fastest start."""
    heads = ["engine", *(head for _, _, head in COLUMNS), "peak MiB", "load s", "noisy"]
    rows = [heads]
    for engine, workloads in done.items():
        cells = [_cell(workloads.get(workload, {}).get(figure)) for workload, figure, _ in COLUMNS]
        peak = max((w["peak_rss_mib"] for w in workloads.values()), default=0.0)
        starts = told.get(engine, {}).get("start_s", [])
        noisy = sum(w["noisy"] for w in workloads.values())
        rows.append([engine, *cells, _cell(peak), _cell(min(starts, default=None)), str(noisy)])
    return aligned(rows)


def ratio_table(pairs: dict[str, dict[str, Any]]) -> str:
    """Return one line per pair of engines: the median ratio of each workload and its spread."""
    named = [*MAIN, *(f"{workload} {figure}" for workload, figure in FIRSTS.items())]
    names = [name for name in named if any(name in workloads for workloads in pairs.values())]
    rows = [["ratio (above 1: the first is faster)", *names]]
    for pair, workloads in pairs.items():
        cells = [
            f"{w['ratio']:.2f} ({w['least']:.2f}-{w['most']:.2f})" if (w := workloads.get(name)) else "-"
            for name in names
        ]
        rows.append([pair, *cells])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def clean(value: Any) -> Any:
    """Return `value` fit for a committed document: no paths, no numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return plain(value) if isinstance(value, str) else value


def write(folder: Path, document: dict[str, Any]) -> Path:
    """Write the document as `result.json` under `folder` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    path.write_text(json.dumps(clean(document), indent=1, sort_keys=False) + "\n", encoding="utf-8")
    return path


def last_line(document: dict[str, Any], keys: Sequence[str]) -> str:
    """Return the compact JSON that ends a script's output: the named parts of the document."""
    return json.dumps(clean({key: document[key] for key in keys if key in document}), separators=(",", ":"))


def extras(document: dict[str, Any]) -> list[str]:
    """Return W1's bound and the tables of W5 (by load), W6 (fitted terms) and W7 (phases), where there."""
    made = []
    for engine, curve in document.get("open_loop", {}).items():
        names = ["load", "output_tok_s", "goodput_tok_s", "refused", "failed"]
        names += [f"{kind}_p{share}_s" for kind in ("first_token", "inter_token") for share in (50, 95, 99)]
        heads = [name.removesuffix("_s").replace("_", " ") for name in names]
        rows = [[_cell(point[name]) for name in names] for point in curve["points"]]
        made.append(
            f"W5, {engine}: capacity {curve['capacity_per_s']:.2f} requests/s\n{aligned([heads, *rows])}"
        )
    for engine, part in document.get("steps", {}).items():
        for kind, terms in part["terms"].items():
            if terms:
                told = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
                made.append(f"W6, {engine}, {kind}: {told}")
        if share := part.get("share"):
            whole, own = share["step_s"] * 1e3, share["engine_share"]
            made.append(
                f"engine's own part of a step, {engine}: {own:.2%} of {whole:.1f} ms at {share['sequences']}"
            )
    for engine, bound in document.get("bounds", {}).items():
        made.append(
            f"W1, {engine}: {bound['reached']:.2f} ({bound['least']:.2f}-{bound['most']:.2f}) of the"
            f" {bound['bound_tok_s']:.0f} tok/s that reading {bound['step_mib']:.0f} MiB a token allows at"
            f" {bound['read_gb_s']:.1f} GB/s"
        )
    for engine, used in document.get("idle", {}).items():
        made.append(f"idle, {engine}: {used:.2%} of one CPU")
    for engine, starts in document.get("starts", {}).items():
        done = medians(starts)
        rows = [[name, f"{seconds:.2f}"] for name, seconds in sorted(done.items(), key=lambda item: item[1])]
        made.append(f"W7, {engine}\n{aligned([['phase reached after', 's'], *rows])}")
    return made
