"""The committed sample notebook: the example product's, executed with the demo model behind it.

    python -m tests.infra.marketplace.example CHECKPOINT     writes infra/marketplace/example/notebook.ipynb

Owns: how it is made. Must not know: how it is checked.
Invariant: the same model and product give the same bytes: temperature 0, no time and no id is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from infra.marketplace import notebook, rehearsal, request
from scripts.endpoint import Endpoint
from tests.infra.marketplace import making

COMMITTED = making.EXAMPLE.parent / "example" / notebook.NAME


def cells() -> tuple[notebook.Cell, ...]:
    """Return the example's cells."""
    return notebook.cells(making.words(), request.JSON_TYPE)


def executed(server: str) -> str:
    """Return the notebook's file as the server at HOST:PORT gives it."""
    printed = rehearsal.run(cells(), server, making.words().product.package_name)
    return notebook.text(notebook.document(cells(), printed))


def main() -> int:
    """Write the committed file."""
    with Endpoint(Path(sys.argv[1]), environment={"STRONGROOM_WORKERS": "1"}) as endpoint:
        COMMITTED.parent.mkdir(exist_ok=True)
        COMMITTED.write_text(executed(f"127.0.0.1:{endpoint.port}"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
