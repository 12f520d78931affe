"""The generated pages: settings and errors as Markdown tables.

Owns: their layout. Must not know: anything the two tables do not say.
Invariant: the output depends on the tables alone, so that a stale copy can be found by comparing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sagemaker_entry.errors import TABLE
from sagemaker_entry.settings import GUARDED, IGNORED, Settings, variable


def settings_page() -> str:
    """Return the settings reference as Markdown."""
    lines = [
        "# Settings",
        "",
        "Read once at start from the environment. A malformed value or an unknown `STRONGROOM_` name stops the",
        "start. An empty value means unset.",
        "",
        "| Variable | Also read | Type | Default | Meaning |",
        "|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(Settings):
        rules = field.metadata
        aliases = [f"`{rules['first']}` (wins)"] if "first" in rules else []
        aliases += [f"`{name}`" for name in rules.get("aliases", ())]
        default = "derived" if field.default is None else f"`{field.default}`"
        cells = (f"`{variable(field.name)}`", ", ".join(aliases), _kind(field), default, rules["doc"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Refused unless harmless:", ""]
    lines += [f"- `{name}`: {hint}" for name, (_, hint) in GUARDED.items()]
    lines += ["", "Ignored, with one warning: " + ", ".join(f"`{name}`" for name in IGNORED) + ".", ""]
    return "\n".join(lines)


def errors_page() -> str:
    """Return the error reference as Markdown."""
    lines = [
        "# Errors",
        "",
        "Every error a client can get. The text comes from this table alone and never repeats what was sent.",
        "",
        "| Code | Status | `type` | TGI `error_type` | Message |",
        "|---|---|---|---|---|",
    ]
    for code, rule in TABLE.items():
        lines.append(
            f"| `{code.value}` | {rule.status} | `{rule.type}` | `{rule.tgi_type}` | {rule.message} |"
        )
    return "\n".join([*lines, ""])


def _kind(field: dataclasses.Field[Any]) -> str:
    rules = field.metadata
    if "choices" in rules:
        return " \\| ".join(f"`{choice}`" for choice in rules["choices"])
    if "rule" in rules:
        return str(rules["rule"])
    unit = f" {rules['unit']}" if "unit" in rules else ""
    return f"{rules['low']} to {rules['high']}{unit}"
