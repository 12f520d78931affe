"""The quality report as JSON, as a table for people and as a plot.

Owns: the report's schema, its files, wording. Must not know: how anything was measured.
Invariant: everything a reader needs to repeat the measurement is in the report; the three forms say the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from container.model.quality.measure import Row

SCHEMA: Final = 1
JSON_NAME: Final = "quality.json"
TABLE_NAME: Final = "quality.md"
PLOT_NAME: Final = "quality.svg"
MIB: Final = 1024 * 1024
# A variant may be called practically lossless from here on: the bar set for 8 bits (llama.cpp's Q8_0 measures
# about the same on small models).
FAITHFUL_KL: Final = 0.01
EXACT_KL: Final = 1e-6  # below this only sums in another order differ
_EXACT_NOTE: Final = (
    "Hold exactly the reference's weights: {}. The checkpoint was made from such a form, so for other models "
    "this says nothing."
)


@dataclass(frozen=True, slots=True)
class Report:
    """Rows in the order measured, the first being the reference, with what they were measured on."""

    architecture: str
    parameters: int
    text: str
    text_sha256: str
    window_tokens: int
    positions: int
    reference: str  # how the reference computes
    machine: dict[str, str | int]
    versions: dict[str, str]
    date: str  # ISO 8601, UTC
    command: str
    rows: tuple[Row, ...]

    def document(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {"schema": SCHEMA, **asdict(self), "rows": [asdict(row) for row in self.rows]}


def write(report: Report, directory: Path) -> list[Path]:
    """Write JSON, table and plot into `directory`, made if missing; return the paths. Raises OSError."""
    from container.model.quality.plot import draw  # matplotlib: only for those who write a report

    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in (JSON_NAME, TABLE_NAME, PLOT_NAME)]
    paths[0].write_text(json.dumps(report.document(), indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(table(report), encoding="utf-8")
    draw(report, paths[2])
    return paths


def table(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"# What quantization costs: {report.architecture}, {report.parameters / 1e6:.0f} M parameters",
        "",
        f"Against {report.reference}, {report.positions} positions in windows of "
        f"{report.window_tokens} tokens of {report.text} (SHA-256 `{report.text_sha256[:16]}`).",
        "",
        "| variant | weights MiB | perplexity | KL mean | KL p99 | top-1 | prefill | decode 1 | decode 8 |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in report.rows),
        "",
        "KL in nats per token; top-1 is the share of positions with the same likeliest token; the last three "
        "are speeds relative to the reference, measured in turn with it.",
        "",
        *([_EXACT_NOTE.format(", ".join(exact(report))), ""] if exact(report) else []),
        f"Machine: {', '.join(f'{name} {value}' for name, value in report.machine.items())}. "
        f"Versions: {', '.join(f'{name} {value}' for name, value in report.versions.items())}. "
        f"Date: {report.date}. Command: `{report.command}`.",
        "",
    ]
    return "\n".join(lines)


def exact(report: Report) -> list[str]:
    """Return the quantizations that lost nothing here."""
    return [
        row.variant
        for row in report.rows[1:]
        if row.quality is not None and row.quality.kl_mean < EXACT_KL and row.variant != "bfloat16"
    ]


def _line(row: Row) -> str:
    if row.quality is None or row.weight_bytes is None or row.decode_speedup is None:
        return f"| {row.variant} | not measured: {row.refused} | | | | | | | |"
    quality = row.quality
    cells = [
        row.variant,
        f"{row.weight_bytes / MIB:.0f}",
        f"{quality.perplexity:.3f}",
        f"{quality.kl_mean:.5f}",
        f"{quality.kl_p99:.4f}",
        f"{quality.top1_agreement:.3f}",
        f"{row.prefill_speedup:.2f}x",
        *(f"{speedup:.2f}x" for speedup in row.decode_speedup.values()),
    ]
    return "| " + " | ".join(cells) + " |"
