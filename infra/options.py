"""Options that every verb of the command line takes.

Owns: their names and help. Must not know: verbs. Invariant: importing this file imports no room.
"""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
