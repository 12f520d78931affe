"""A template as YAML text: deterministic, and read back as the same values by any YAML 1.1 reader.

Owns: the text form; intrinsics in CloudFormation's short form (`!Ref`, `!If`), small values on one line: a
file must stay below what CloudFormation takes without a bucket. Must not know: resources. Standard library
only. Invariant: a text that YAML could take for something else (`no`, `0123`, `1e3`, a date) is quoted.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

# Begins with a letter and holds nothing that YAML reads: colons only inside words, no comment, no space at an
# end.
_PLAIN: Final = re.compile(r"[A-Za-z](?:[A-Za-z0-9 ._/,()-]|:(?! |$))*[A-Za-z0-9._/)-]|[A-Za-z]")
_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"})
_FLOW: Final = re.compile(r"[A-Za-z](?:[A-Za-z0-9 ._/()-]|:(?=[A-Za-z0-9:]))*[A-Za-z0-9._/)-]|[A-Za-z]")
_SHORT: Final = frozenset(
    {"Ref", "Fn::Equals", "Fn::FindInMap", "Fn::GetAtt", "Fn::If", "Fn::Join", "Fn::Not", "Fn::Sub"}
)
_INDENT: Final = "  "
_WIDTH: Final = 120  # of a value on one line


def text(document: dict[str, Any]) -> str:
    """Return `document` in block style, in its own order."""
    return "\n".join(_block(document, "")) + "\n"


def _block(value: Any, indent: str) -> list[str]:
    lines: list[str] = []
    if isinstance(value, dict):
        for key, held in value.items():
            # A list stands at its key's own depth, as YAML allows: the dash is indent enough.
            deeper = indent if isinstance(held, list) else indent + _INDENT
            lines += _entry(f"{indent}{_scalar(key)}:", held, deeper)
        return lines
    for held in value:
        line = _line(held)
        if line is not None:
            lines.append(f"{indent}- {line}")
            continue
        inner = _block(held, indent + _INDENT)
        lines += [f"{indent}- {inner[0][len(indent + _INDENT) :]}", *inner[1:]]
    return lines


def _entry(head: str, held: Any, indent: str) -> list[str]:
    line = _line(held)
    return [head, *_block(held, indent)] if line is None else [f"{head} {line}"]


def _line(value: Any) -> str | None:
    """Return `value` on one line, None where it needs several."""
    if not isinstance(value, dict | list) or not value:
        return _scalar(value)
    if isinstance(value, dict) and list(value) in (["Ref"], ["Fn::Sub"]) and isinstance(_only(value), str):
        return f"!{next(iter(value)).removeprefix('Fn::')} {_scalar(_only(value))}"
    flow = _flow(value)
    return flow if len(flow) <= _WIDTH else None


def _only(value: dict[str, Any]) -> Any:
    """Return the one value of a mapping with one entry."""
    (held,) = value.values()
    return held


def _flow(value: Any) -> str:
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _SHORT:
        name, held = next(iter(value)), _only(value)
        if name == "Fn::GetAtt":
            return f"!GetAtt {_flow('.'.join(held))}"
        return f"!{name.removeprefix('Fn::')} {_flow(held)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(held) for held in value) + "]"
    return _scalar(value, _FLOW)


def _scalar(value: Any, plain: re.Pattern[str] = _PLAIN) -> str:
    if isinstance(value, str) and plain.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value)  # quotes, numbers, true, false, {} and [] mean the same in JSON and in YAML
