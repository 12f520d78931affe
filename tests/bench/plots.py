"""Pictures of a result, as PNG beside its document.

Owns: the drawing. Must not know: anything but the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.report import MAIN, good

LONGEST_LEGEND = 8


def draw(folder: Path, document: dict[str, Any]) -> list[str]:
    """Draw what the document has figures for and return the names of the files."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display anywhere this runs
    made = []
    for name, part in (("rates", _rates), ("load", _load), ("steps", _steps), ("start", _start)):
        figure = part(document)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            figure.clear()
            made.append(f"{name}.png")
    return made


def _figure(columns: int, document: dict[str, Any]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 4.0), layout="constrained")
    where = document["machine"]
    figure.suptitle(
        f"{document['model']}\n{where['cpu']}, {where['cores']} cores; {document['date']}", fontsize=8
    )
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _rates(document: dict[str, Any]) -> Any:
    """Bars of the main figure by engine, whiskers from the least to the greatest round."""
    records = document.get("records", [])
    engines = list(dict.fromkeys(r["engine"] for r in records))
    present = [w for w in MAIN if any(good(records, e, w) for e in engines)]
    if not present:
        return None
    figure, axes = _figure(len(present), document)
    for axis, workload in zip(axes, present, strict=True):
        for place, engine in enumerate(engines):
            values = sorted(r["figures"][MAIN[workload]] for r in good(records, engine, workload))
            if values:
                middle = values[len(values) // 2]
                spread = [[middle - values[0]], [values[-1] - middle]]
                axis.barh(place, middle, xerr=spread, color=f"C{place % 10}", ecolor="black")
        axis.set_yticks(range(len(engines)), engines if axis is axes[0] else [""] * len(engines), fontsize=7)
        axis.set_title(workload)
        axis.set_xlabel(MAIN[workload].replace("_tok_s", " tokens/s"))
    return figure


def _load(document: dict[str, Any]) -> Any:
    """W5: goodput, first token and inter-token time against load."""
    curves = document.get("open_loop", {})
    if not curves:
        return None
    figure, axes = _figure(3, document)
    for place, (engine, curve) in enumerate(curves.items()):
        loads = [point["load"] for point in curve["points"]]
        for name, style in (("output_tok_s", ":"), ("goodput_tok_s", "-")):
            axes[0].plot(loads, _column(curve, name), style, color=f"C{place}", label=f"{engine} {name}")
        for axis, kind in ((axes[1], "first_token"), (axes[2], "inter_token")):
            for share, style in ((50, "-"), (95, "--"), (99, ":")):
                axis.plot(
                    loads, _column(curve, f"{kind}_p{share}_s"), style, color=f"C{place}", label=f"p{share}"
                )
    for axis, title in zip(axes, ("tokens/s", "first token, s", "between tokens, s"), strict=True):
        axis.set(xlabel="load, times capacity", title=title, ylim=(0, None))
        axis.legend(fontsize=6)
    return figure


def _column(curve: dict[str, Any], name: str) -> list[float]:
    return [point[name] for point in curve["points"]]


def _steps(document: dict[str, Any]) -> Any:
    """W6: milliseconds of a decode step against batch, a line per context."""
    measured = document.get("steps", {})
    if not measured:
        return None
    figure, axes = _figure(len(measured), document)
    for axis, (engine, part) in zip(axes, measured.items(), strict=True):
        decodes = [p for p in part["points"] if p["tokens"] == p["batch"]]
        for context in sorted({p["context"] for p in decodes})[:LONGEST_LEGEND]:
            line = sorted((p["batch"], p["step_s"] * 1e3) for p in decodes if p["context"] == context)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"context {context:.0f}")
        axis.set(xlabel="batch", ylabel="ms a step", title=engine, xscale="log", yscale="log")
        axis.legend(fontsize=7)
    return figure


def _start(document: dict[str, Any]) -> Any:
    """W7: when each phase was reached, a row per phase, a point per start."""
    starts: dict[str, Sequence[dict[str, float]]] = document.get("starts", {})
    if not starts:
        return None
    figure, axes = _figure(len(starts), document)
    for axis, (engine, each) in zip(axes, starts.items(), strict=True):
        names = sorted(each[0], key=lambda name: each[0][name])
        for phases in each:
            axis.plot([phases.get(name) for name in names], range(len(names)), "o", alpha=0.6)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set(xlabel="s after the process started", title=engine, xlim=(0, None))
    return figure
