"""`strongroom licence`: verbs and their options.

Owns: names and help. Must not know: what a licence holds.
Invariant: importing this file imports no room; no option takes a secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra import report
from infra.options import Json

app = typer.Typer(help="Licences for hosts without a network: made, shown and checked.", no_args_is_help=True)

Roots = Annotated[list[str], typer.Option(help="The vendor's public signing key, `ed25519:...`; repeatable.")]
File = Annotated[Path, typer.Argument(help="The licence file.")]


@app.command()
def make(
    package: Annotated[list[Path], typer.Option(help="Directory of a sealed package; repeatable.")],
    key: Annotated[str, typer.Option(help="Key source of the data key: recipient:file:/PATH, file:/PATH.")],
    signing_key: Annotated[Path, typer.Option(help="File of the vendor's private signing key.")],
    installation: Annotated[
        list[str], typer.Option(help="Public key of an installation, `x25519:...`; repeatable.")
    ],
    customer: Annotated[str, typer.Option(help="Whom the licence is for.")],
    id: Annotated[str, typer.Option("--id", help="The licence's number.")],
    not_after: Annotated[str, typer.Option(help="Last day, YYYY-MM-DD, in UTC.")],
    out: Annotated[Path, typer.Option(help="New file for the licence; never overwritten.")],
    not_before: Annotated[
        str | None, typer.Option(help="First day, YYYY-MM-DD; without it, from now.")
    ] = None,
    feature: Annotated[list[str] | None, typer.Option(help="A feature it grants; repeatable.")] = None,
    epoch_min: Annotated[int, typer.Option(min=0, help="Packages of an older epoch no longer start.")] = 0,
    root: Annotated[
        list[str] | None, typer.Option(help="Further vendor signing key that the packages bear; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Wrap packages' data keys for a customer's installations under signed terms."""
    from infra import licences

    asked = licences.Order(
        customer=customer,
        id=id,
        not_before=not_before,
        not_after=not_after,
        features=tuple(feature or ()),
        epoch_min=epoch_min,
    )
    report.run(
        "licence make",
        as_json,
        lambda: licences.make(package, key, signing_key, installation, asked, root or [], out),
        licences.show,
    )


@app.command()
def show(file: File, root: Roots, as_json: Json = False) -> None:
    """Print the terms of a licence whose signature holds."""
    from infra import licences

    report.run("licence show", as_json, lambda: licences.read(file, root), licences.show)


@app.command()
def check(
    file: File,
    root: Roots,
    package: Annotated[Path | None, typer.Option(help="Directory of the package it must open.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Key source of the installation's private key, with --package.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="State directory with the last start's time.")] = None,
    as_json: Json = False,
) -> None:
    """Check now what a start would check: signature, dates, clock, and with --package that it opens."""
    from infra import licences

    report.run(
        "licence check", as_json, lambda: licences.check(file, root, package, key, state), licences.show
    )
