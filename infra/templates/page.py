"""`infra/README.md`: what is deployed, what may be chosen, what each right is for, how all of it goes again.

Owns: the tables, made from the templates' data; the words between them are in `readme.md`. Must not know: the
CDK, boto3.
Invariant: nothing is on the page that the templates do not hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from infra.templates import iam, network, params, reasons, template
from infra.templates.parameter_table import TABLE
from infra.templates.variants import ALL, SOURCES, TRAFFIC

_SOURCE: Final = Path(__file__).parent / "readme.md"


def page() -> str:
    """Return the page: `readme.md` with its tables filled in."""
    text = _SOURCE.read_text(encoding="utf-8")
    tables = {
        "templates": _templates(),
        "parameters": _parameters(),
        "rights": _rights(),
        "operators": ", ".join(f"`{name}`" for name in network.OPERATOR_SERVICES.values()),
        "findings": _explained(),
    }
    for name, table in tables.items():
        assert text.count(f"{{{{{name}}}}}") == 1, "each table has its one place"
        text = text.replace(f"{{{{{name}}}}}", table.rstrip("\n"))
    return text


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)]) + "\n"


def _templates() -> str:
    rows: list[tuple[Any, ...]] = []
    for traffic in TRAFFIC:
        names = [
            f"[{source}-{one.network}](rendered/{one.name}.template.yaml)"
            for source in SOURCES
            for one in ALL
            if one.traffic == traffic and one.source == source
        ]
        rows.append((f"`{traffic}-...`", template.TITLES[traffic], ", ".join(names)))
    return _table("Templates", ("name", "for", "files"), rows)


def _parameters() -> str:
    rows: list[tuple[Any, ...]] = []
    for parameter in TABLE:
        default = "required" if parameter.default is None else f"`{parameter.default}`"
        default = "empty" if parameter.default == "" else default
        where = "; ".join(filter(None, (_traffic(parameter), parameter.source, parameter.network))) or "all"
        rows.append((f"`{parameter.name}`", parameter.text, default, where))
    return _table("Parameters", ("name", "meaning", "default", "templates"), rows)


def _traffic(parameter: params.Parameter) -> str:
    return "" if len(parameter.traffic) == len(TRAFFIC) else ", ".join(parameter.traffic)


def _rights() -> str:
    rows: list[tuple[Any, ...]] = [(f"`{sid}`", reason) for sid, reason in iam.REASONS.items()]
    return _table("What each permission is for", ("statement", "reason"), rows)


def _explained() -> str:
    rows: list[tuple[Any, ...]] = [("checkov", rule, "", why) for rule, why in reasons.CHECKOV.items()]
    rows += [("cfn-guard", rule, where, why) for (rule, where), why in reasons.GUARD.items()]
    head = ("linter", "rule", "resource", "why it stands")
    return _table("Findings that stand", head, rows)
