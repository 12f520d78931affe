"""The quality report drawn: size against divergence, one point per variant.

Owns: the figure. Must not know: how rows came about.
Invariant: a point stands where its row says; what has no divergence (the reference, refused rows) is named in
words, not placed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from container.model.quality.report import Report

INK: Final = "#1f2933"
MUTED: Final = "#7b8794"
FAITHFUL: Final = "#2f855a"
STRAYING: Final = "#c05621"
MIB: Final = 1024 * 1024


def draw(report: Report, path: Path) -> None:
    """Write the figure to `path`; its suffix chooses the format. Raises OSError."""
    from container.model.quality.report import EXACT_KL, FAITHFUL_KL, exact

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    placed = [row for row in report.rows if row.quality is not None and row.quality.kl_mean >= EXACT_KL]
    for row in placed:
        assert row.quality is not None and row.weight_bytes is not None
        kl = row.quality.kl_mean
        color = FAITHFUL if kl <= FAITHFUL_KL else STRAYING
        axes.plot(row.weight_bytes / MIB, kl, "o", color=color, markersize=8)
        axes.annotate(
            f"{row.variant}\ntop-1 {row.quality.top1_agreement:.1%}",
            (row.weight_bytes / MIB, kl),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yscale("log")
    axes.axhline(FAITHFUL_KL, color=MUTED, linewidth=0.8, linestyle="--")
    axes.annotate(
        f"KL {FAITHFUL_KL}",
        (0.005, FAITHFUL_KL),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=7,
        color=MUTED,
    )
    sizes = [row.weight_bytes / MIB for row in report.rows if row.weight_bytes]
    axes.set_xlim(0, max(sizes, default=1) * 1.25)
    axes.margins(y=0.15)
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("mean KL from the reference, nats per token")
    axes.set_title(_title(report), loc="left", fontsize=10, color=INK)
    if exact(report):
        axes.annotate(
            f"no divergence here: {', '.join(exact(report))}",
            (1, 0.01),
            xycoords="axes fraction",
            ha="right",
            fontsize=7,
            color=MUTED,
        )
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _title(report: Report) -> str:
    first = report.rows[0]
    size = f", {first.weight_bytes / MIB:.0f} MiB" if first.weight_bytes else ""
    return f"{report.architecture}: size against lost quality\nreference: {report.reference}{size}"
