"""The verbs of `strongroom listing` and their options.

Owns: options. Must not know: how anything is done. Invariant: importing this file imports no room.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra import report
from infra.options import Json

app = typer.Typer(
    help="A listing on AWS Marketplace: built from what is measured, checked offline.", no_args_is_help=True
)


@app.command()
def build(
    vendor: Annotated[Path, typer.Option(help="TOML file with the vendor's words; see `listing example`.")],
    package: Annotated[Path, typer.Option(help="Directory of the sealed package.")],
    root: Annotated[
        list[str], typer.Option(help="Public signing key of the vendor, `ed25519:...`; repeatable.")
    ],
    speed: Annotated[
        list[str], typer.Option(help="[INSTANCE_TYPE=]FILE written by scripts/bench serve; repeatable.")
    ],
    server: Annotated[str, typer.Option(help="HOST:PORT of a running server; the samples are its answers.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    quality: Annotated[
        str | None, typer.Option(help="VARIANT=FILE written by `strongroom package quality`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a listing's folder: requests, pages, samples, and what they were made of."""
    from infra.marketplace import building, folder

    given = building.Given(vendor, package, tuple(root), tuple(speed), quality, server, out)
    report.run("listing build", as_json, lambda: building.build(given), folder.show)


@app.command()
def check(
    listing: Annotated[Path, typer.Argument(help="Folder that `listing build` wrote.")],
    as_json: Json = False,
) -> None:
    """Look at a listing's folder again: every field, file and figure, without a network."""
    from infra.marketplace import folder

    report.run("listing check", as_json, lambda: folder.check(listing), folder.show)


@app.command()
def example() -> None:
    """Print a vendor file to begin with."""
    text = (Path(__file__).parent / "vendor.example.toml").read_text(encoding="utf-8")
    print(text, end="")
