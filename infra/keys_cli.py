"""`strongroom key`: verbs and their options.

Owns: names and help. Must not know: what a key is.
Invariant: importing this file imports no room; no option takes a secret, since others can read a process's
arguments.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from infra import report
from infra.options import Json

app = typer.Typer(
    help="Keys: made, named and compared. Nothing secret is ever printed.", no_args_is_help=True
)


class Made(enum.StrEnum):
    """What can be made."""

    INSTALLATION = "installation"
    HYBRID = "hybrid"
    SIGNING = "signing"
    DATA = "data"
    OMS = "oms"


class Paired(enum.StrEnum):
    """What has a public half."""

    INSTALLATION = "installation"
    HYBRID = "hybrid"
    SIGNING = "signing"
    OMS = "oms"


class Holder(enum.StrEnum):
    """Whose package a key opens."""

    CUSTOMER = "customer"
    VENDOR = "vendor"


@app.command()
def make(
    kind: Annotated[
        Made,
        typer.Option(
            help="installation, hybrid: data keys are wrapped for it; signing: signs; "
            "data: seals one package; "
            "oms: signs for OpenSSF model-signing."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New file for the private key, mode 0600; never overwritten.")],
    as_json: Json = False,
) -> None:
    """Make a key, write its private half to a new file, and print its public half."""
    from infra import keys

    report.run("key make", as_json, lambda: keys.make(kind.value, out), keys.show)


@app.command()
def public(
    kind: Annotated[Paired, typer.Option(help="What the private key is for.")],
    key: Annotated[Path, typer.Option(help="File of the private key, readable for its owner alone.")],
    as_json: Json = False,
) -> None:
    """Print the public half of a private key: what to send to the other party."""
    from infra import keys

    report.run("key public", as_json, lambda: keys.public(kind.value, key), keys.show)


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="A public key, as the other party sent it.")],
    as_json: Json = False,
) -> None:
    """Print what a public key is for and its id: read the id to each other before you trust it."""
    from infra import keys

    report.run("key show", as_json, lambda: keys.describe(key), keys.show)


@app.command()
def split(
    key: Annotated[Path, typer.Option(help="File of the data key.")],
    image_share: Annotated[Path, typer.Option(help="New file for the share that the image carries.")],
    artifact_share: Annotated[Path, typer.Option(help="New file for the share that the artifact carries.")],
    as_json: Json = False,
) -> None:
    """Divide a data key for `image:`: obfuscation, since image and artifact together hold the whole key."""
    from infra import keys

    report.run("key split", as_json, lambda: keys.split(key, image_share, artifact_share), keys.show)


@app.command()
def unlock(
    description: Annotated[
        Path, typer.Option(help="File with what the container's `describe` call returned.")
    ],
    package: Annotated[Path, typer.Option(help="Directory of the sealed adapter, or of the base.")],
    root: Annotated[str, typer.Option(help="Public signing key of the package, `ed25519:...`.")],
    key: Annotated[str, typer.Option(help="Key source of the data key: recipient:file:/PATH, file:/PATH.")],
    image: Annotated[list[str], typer.Option(help="Image version that may get the key; repeatable.")],
    out: Annotated[Path, typer.Option(help="New file for the message; never overwritten.")],
    owner: Annotated[Holder, typer.Option(help="Whose package it is.")] = Holder.CUSTOMER,
    as_json: Json = False,
) -> None:
    """Seal a package's data key to a running container that no key service reaches."""
    from infra import unlocking

    report.run(
        "key unlock",
        as_json,
        lambda: unlocking.seal(description, package, owner.value, root, key, image, out),
        unlocking.show,
    )
