"""The table of architectures, made from what the probes say about the tiny models.

`python -m tests.model.architectures` writes architectures.md anew; a test compares it byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from tests.model.driving import built
from tests.model.tiny import ARCHITECTURES

TABLE = Path(__file__).with_name("architectures.md")
HEAD = """# Architectures

Tiny seeded models, one per row, as the load-time probes judge them. Generated: run
`python -m tests.model.architectures` after a change.

| model type | class | runner | reason |
|---|---|---|---|
"""


def render() -> str:
    """Return the page as markdown."""
    rows = []
    for kind in sorted(ARCHITECTURES):
        _, facts, _ = built(kind)
        reason = "" if facts.reason is None else f"`{facts.reason}`"
        rows.append(f"| {kind} | {facts.architecture} | {facts.runner} | {reason} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    TABLE.write_text(render(), encoding="utf-8")
