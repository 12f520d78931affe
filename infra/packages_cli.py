"""`strongroom package`: the verbs on sealed packages and their options.

Owns: names and help. Must not know: what a package is.
Invariant: importing this file imports no room; no option takes a secret.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from infra import report
from infra.options import Json

app = typer.Typer()


class Owner(enum.StrEnum):
    """Whose package."""

    VENDOR = "vendor"
    CUSTOMER = "customer"


MAX_THREADS = 64
Package = Annotated[Path, typer.Argument(help="Directory of a sealed package.")]
Roots = Annotated[
    list[str], typer.Option(help="Public signing key that may have signed it, `ed25519:...`; repeatable.")
]
Whose = Annotated[Owner, typer.Option(help="Whose package it must be: a base is the vendor's.")]
Base = Annotated[
    Path | None, typer.Option(help="Of an adapter: directory of the sealed base it was made from.")
]
BaseRoots = Annotated[list[str] | None, typer.Option(help="Public signing key of the base; repeatable.")]
Key = Annotated[str, typer.Option(help="Key source: file:/PATH, recipient:file:/PATH and others.")]
SigningKey = Annotated[Path, typer.Option(help="File of the owner's private signing key.")]
Recipients = Annotated[
    list[str] | None,
    typer.Option(help="Public key the data key is wrapped for, of `strongroom key`; repeatable."),
]
Threads = Annotated[int, typer.Option(min=1, max=MAX_THREADS, help="Threads that seal or open.")]


Name = Annotated[str, typer.Option(help="The model's name.")]
Version = Annotated[str, typer.Option(help="The model's version.")]
DataKey = Annotated[
    str, typer.Option(help="Key source of the data key: file:/PATH; see `strongroom key make`.")
]
Epoch = Annotated[int, typer.Option(min=0, help="Raised when older packages must no longer start.")]
OmsKey = Annotated[
    Path | None, typer.Option(help="File of a P-256 key, to sign for OpenSSF model-signing as well.")
]
Out = Annotated[Path, typer.Option(help="New directory, or one where an interrupted run stopped.")]


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="Directory with safetensors weights, or a GGUF file.")],
    out: Out,
    name: Name,
    version: Version,
    key: DataKey,
    signing_key: SigningKey,
    licence: Annotated[str, typer.Option(help="SPDX identifier, or `LicenseRef-NAME`.")],
    licence_text: Annotated[
        Path | None, typer.Option(help="File with its text; without it, SOURCE's own.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="What the model was made from, `OWNER/NAME`.")
    ] = None,
    tensor_parallel: Annotated[
        str, typer.Option(help="Numbers of ranks to divide it for beforehand, by commas.")
    ] = "1",
    quantize: Annotated[
        str, typer.Option(help="Schemes to measure and to divide it in, by commas.")
    ] = "int8-block",
    quality_tokens: Annotated[
        int,
        typer.Option(min=1, help="Length of the text that quality is measured on; its time grows with it."),
    ] = 4096,
    without_weights: Annotated[
        bool,
        typer.Option(
            "--without-weights",
            help="Leave the unquantized weights out: smaller, and served in the schemes and ranks of its "
            "parts alone, on machines that have their operators.",
        ),
    ] = False,
    archive: Annotated[Path | None, typer.Option(help="Also a new file, as `model.tar.gz`.")] = None,
    recipient: Recipients = None,
    epoch: Epoch = 0,
    threads: Threads = 2,
    oms_key: OmsKey = None,
    nonce_seed: Annotated[str | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Convert, quantize, divide, measure, document, seal and sign a model; run again to go on."""
    from infra import building, model_card, packages

    def verb() -> report.Result:
        declared = model_card.Declared(licence, base_model)
        planned = building.plan(
            source,
            out,
            tensor_parallel,
            quantize,
            quality_tokens,
            declared,
            licence_text,
            archive,
            without_weights=without_weights,
        )
        order = packages.Order(name, version, epoch, tuple(recipient or ()))
        return building.build(planned, order, building.Keys(key, signing_key, oms_key, nonce_seed), threads)

    report.run("package build", as_json, verb, packages.show)


@app.command()
def seal(
    model: Annotated[Path, typer.Argument(help="Directory with safetensors, tokenizer and configuration.")],
    out: Out,
    name: Name,
    version: Version,
    key: DataKey,
    signing_key: SigningKey,
    recipient: Recipients = None,
    epoch: Epoch = 0,
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Seal and sign a directory as it lies, an adapter for one; run again to go on."""
    from infra import packages

    order = packages.Order(name, version, epoch, tuple(recipient or ()))
    trusted = packages.Trusted(owner.value, (), base, tuple(base_root or ()))
    report.run(
        "package seal",
        as_json,
        lambda: packages.seal(packages.files_of(model), out, order, trusted, key, signing_key, threads),
        packages.show,
    )


@app.command()
def inspect(
    package: Package,
    root: Roots,
    key: Annotated[str | None, typer.Option(help="Key source, to count tensors.")] = None,
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    as_json: Json = False,
) -> None:
    """Show what a package says of itself, once its signature holds."""
    from infra import packages

    trusted = packages.Trusted(owner.value, tuple(root), base, tuple(base_root or ()))
    report.run("package inspect", as_json, lambda: packages.inspect(package, trusted, key), packages.show)


@app.command()
def verify(
    package: Package,
    root: Roots,
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    oms_root: Annotated[
        Path | None, typer.Option(help="Public P-256 key as PEM: proves `model.oms.sig` as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove every byte of a package, and of the documents beside it, without its key."""
    from infra import packages

    trusted = packages.Trusted(owner.value, tuple(root), base, tuple(base_root or ()))
    report.run("package verify", as_json, lambda: packages.verify(package, trusted, oms_root), packages.show)


@app.command()
def unseal(
    package: Package,
    root: Roots,
    key: Key,
    out: Annotated[Path, typer.Option(help="New directory for the plain files.")],
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Write a package's plain files, bit for bit as they were sealed. For its owner."""
    from infra import packages

    trusted = packages.Trusted(owner.value, tuple(root), base, tuple(base_root or ()))
    report.run(
        "package unseal",
        as_json,
        lambda: packages.unseal(package, trusted, key, out, threads),
        packages.show,
    )


@app.command()
def archive(
    package: Package,
    root: Roots,
    out: Annotated[Path, typer.Option(help="New file, as `model.tar.gz`.")],
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    as_json: Json = False,
) -> None:
    """Write a package as one archive that SageMaker unpacks to /opt/ml/model."""
    from infra import packages

    trusted = packages.Trusted(owner.value, tuple(root), base, tuple(base_root or ()))
    report.run("package archive", as_json, lambda: packages.archive(package, trusted, out), packages.show)


@app.command()
def rewrap(
    package: Package,
    root: Roots,
    key: Key,
    signing_key: SigningKey,
    out: Annotated[Path, typer.Option(help="New directory; sealed files are linked or copied.")],
    recipient: Recipients = None,
    epoch: Annotated[int | None, typer.Option(min=0, help="Without it, the package's.")] = None,
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    oms_key: OmsKey = None,
    as_json: Json = False,
) -> None:
    """Wrap a package's key for other recipients and sign again; no sealed byte changes."""
    from infra import packages

    trusted = packages.Trusted(owner.value, tuple(root), base, tuple(base_root or ()))
    report.run(
        "package rewrap",
        as_json,
        lambda: packages.rewrap(package, trusted, key, signing_key, recipient or [], out, epoch, oms_key),
        packages.show,
    )


@app.command()
def diff(
    first: Package,
    second: Package,
    root: Roots,
    key: Annotated[
        list[str] | None, typer.Option(help="Key source; give it twice, for each package.")
    ] = None,
    owner: Whose = Owner.VENDOR,
    base: Base = None,
    base_root: BaseRoots = None,
    as_json: Json = False,
) -> None:
    """Show in what two packages differ; with both keys, also what they hold, by file and number."""
    from infra import packages

    trusted = packages.Trusted(owner.value, tuple(root), base, tuple(base_root or ()))
    report.run(
        "package diff", as_json, lambda: packages.diff(first, second, trusted, key or []), packages.show
    )
