"""The command line, `strongroom`.

Owns: verbs and their options. Must not know: how anything is done; every verb imports its room when it runs.
Invariant: importing this file imports no SDK, no torch and no room; every verb has `--json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from infra import keys_cli, licences_cli, packages_cli, report
from infra.deploy.commands import app as deploy
from infra.marketplace.commands import app as listing
from infra.options import Json
from infra.report import CommandError, ExitCode, Result

app = typer.Typer(
    name="strongroom",
    help="LLM inference that a model vendor ships and a customer runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

package = typer.Typer(help="The vendor's side: what goes into a model package.", no_args_is_help=True)
app.add_typer(package, name="package")
package.add_typer(packages_cli.app)
app.add_typer(keys_cli.app, name="key")
app.add_typer(licences_cli.app, name="licence")
app.add_typer(deploy, name="deploy")
app.add_typer(listing, name="listing")

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]

EMULATOR_PORT = 8181
SERVER_PORT = 8080
BODY_BYTES = 6_291_456  # the service model's limit
TOKEN_S = 43_200
QUALITY_TOKENS = 4096


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Directory of the model.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.")] = None,
    listen: Annotated[str | None, typer.Option(help="unix:/PATH to listen on instead of a port.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the server; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Start the product in the foreground, as the image does."""
    import os

    from infra import serving

    try:
        chosen = serving.environment(os.environ, model, port, env or [], listen)
    except CommandError as error:
        report.fail("serve", as_json, error)
    if as_json:
        names = ("listen",) if chosen.get("STRONGROOM_LISTEN") else ("host", "port")
        shown = {"pid": os.getpid(), **{name: chosen.get(f"STRONGROOM_{name.upper()}") for name in names}}
        report.print_json("serve", ok=True, result=shown)
    serving.become(chosen, quiet_stdout=as_json)


@app.command()
def emulate(
    upstream: Annotated[str, typer.Option(help="HOST:PORT or unix:/PATH of a running server.")],
    endpoint: Annotated[str, typer.Option(help="Name of the endpoint.")] = "strongroom",
    port: Port = EMULATOR_PORT,
    component: Annotated[
        list[str] | None, typer.Option(help="Inference component, NAME or NAME=ADDRESS; repeatable.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Verify signatures against the printed keys.")] = False,
    split: Annotated[str, typer.Option(help="Cut stream parts: none, bytes=N or random:SEED.")] = "none",
    body_limit: Annotated[int, typer.Option(min=1, help="Largest request body, in bytes.")] = BODY_BYTES,
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder that stands for S3 (BUCKET/KEY in it), or the URL of an S3: batch jobs run."
        ),
    ] = None,
    async_output: Annotated[
        str | None,
        typer.Option(help="s3://BUCKET/PREFIX for answers: adds the asynchronous endpoint NAME-async."),
    ] = None,
    fail_after: Annotated[
        int | None, typer.Option(min=1, help="Fail streams as the platform would, after this many parts.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer SageMaker runtime clients from a running server, until Ctrl-C."""
    from infra import emulating

    try:
        emulator = emulating.open_emulator(
            upstream,
            endpoint,
            port,
            component or [],
            strict,
            split,
            body_limit,
            store,
            async_output,
            fail_after,
        )
    except CommandError as error:
        report.fail("emulate", as_json, error)
    with emulating.serving(emulator) as ended:
        report.run("emulate", as_json, lambda: emulating.describe(emulator, endpoint), emulating.show)
        ended.wait()


@app.command()
def invoke(
    endpoint: Annotated[str, typer.Option(help="Name of the endpoint.")] = "strongroom",
    endpoint_url: Annotated[
        str | None,
        typer.Option(
            envvar="AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME",
            help="URL of an emulator, or unix:/PATH of a server; AWS without it.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text of one user message.")] = None,
    body_file: Annotated[
        typer.FileBinaryRead | None, typer.Option(help="File with the request body, - for stdin.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Stream the answer.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, with --prompt.")] = None,
    region: Annotated[str | None, typer.Option(help="AWS region.")] = None,
    as_json: Json = False,
) -> None:
    """Call an endpoint once, as any boto3 program would."""
    from infra import invoking

    if (prompt is None) == (body_file is None):
        usage = CommandError(ExitCode.USAGE, "bad_argument", "give one of `--prompt` and `--body-file`")
        report.fail("invoke", as_json, usage)
    body = body_file.read() if body_file is not None else invoking.chat_body(prompt or "", max_tokens, stream)

    def show(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    def end(_: Result) -> None:
        print()

    report.run(
        "invoke",
        as_json,
        lambda: invoking.call(endpoint_url, region, endpoint, body, stream, show),
        end,
    )


@app.command()
def token(
    local: Annotated[bool, typer.Option("--local", help="Sign with the emulator's keys.")] = False,
    region: Annotated[str | None, typer.Option(help="AWS region.")] = None,
    expires: Annotated[int, typer.Option(min=1, max=TOKEN_S, help="Life of the token in seconds.")] = TOKEN_S,
    as_json: Json = False,
) -> None:
    """Print a bearer token for the OpenAI route of SageMaker endpoints."""
    from infra import bearer

    report.run(
        "token", as_json, lambda: bearer.make(local, region, expires), lambda made: print(made["token"])
    )


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="Directory of a model to look at.")] = None,
    port: Annotated[list[int] | None, typer.Option(help="Port that must be free; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Check whether this machine can run the product."""
    from infra import doctor as room

    ports = port or [SERVER_PORT, EMULATOR_PORT]
    report.run("doctor", as_json, lambda: room.examine(ports, model), room.show)


@package.command()
def quality(
    model: Annotated[Path, typer.Option(help="Directory of the unquantized model.")],
    out: Annotated[Path, typer.Option(help="Directory for the report; made if missing.")],
    variants: Annotated[str | None, typer.Option(help="Comma-separated; without it, all of them.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text instead of the fixed one.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the text to measure on.")] = QUALITY_TOKENS,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what each quantization costs: divergence, size and speed, as table, plot and JSON."""
    from infra import packaging

    report.run(
        "package quality",
        as_json,
        lambda: packaging.quality(model, out, variants, text, tokens, threads),
        packaging.show,
    )


@package.command()
def shard(
    model: Annotated[Path, typer.Option(help="Directory of the unquantized model; parts are put beside it.")],
    tensor_parallel: Annotated[int, typer.Option(min=1, max=64, help="Ranks to divide the model among.")],
    quantize: Annotated[str, typer.Option(help="Scheme of the parts.")] = "none",
    as_json: Json = False,
) -> None:
    """Divide and quantize a model beforehand, so that a start reads no more than its own part."""
    from infra import packaging

    report.run(
        "package shard",
        as_json,
        lambda: packaging.shard(model, tensor_parallel, quantize),
        packaging.show_parts,
    )


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    python = "{}.{}.{}".format(*sys.version_info[:3])
    found = {"version": report.version(), "python": python}
    report.run("version", as_json, lambda: found, lambda result: print(result["version"]))


def main() -> None:
    """Run the command line and exit; with `--json`, a usage error is a JSON object as well."""
    if "--json" not in sys.argv:
        app()
        return
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        usage = CommandError(ExitCode.USAGE, "usage", error.format_message(), "add --help to the verb")
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        report.fail(verb, True, usage)
    raise SystemExit(code if isinstance(code, int) else ExitCode.DONE)
