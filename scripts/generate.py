"""Writes the reference pages that are made from code, or checks that the committed ones are current.

Owns: the list of generated pages. Must not know: how a page is made; each room renders its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from infra.image import seccomp
from infra.templates import page, render
from sagemaker_entry.reference import errors_page, settings_page

ROOT = Path(__file__).parent.parent
PAGES: dict[str, Callable[[], str]] = {
    "sagemaker_entry/SETTINGS.md": settings_page,
    "sagemaker_entry/ERRORS.md": errors_page,
    "infra/README.md": page.page,
    "infra/airgap/run/seccomp.json": seccomp.text,
    **render.pages(),
}


def main() -> int:
    """Return 1 with the stale pages on stderr when `--check` is given and one differs."""
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if "--check" in sys.argv:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"error: `{name}` is stale\nhint: run python -m scripts.generate", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
