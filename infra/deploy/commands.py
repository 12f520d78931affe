"""The verbs of `strongroom deploy` and their options.

Owns: options, confirmation, printing. Must not know: how anything is done; verbs import their rooms.
Invariant: importing this file imports no SDK; with `--json` nothing is asked and progress goes to stderr.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from infra import report
from infra.options import Json
from infra.report import CommandError, ExitCode, Result

if TYPE_CHECKING:
    from infra.deploy.aws import Aws
    from infra.deploy.choices import Choices

app = typer.Typer(help="Deploy on AWS: look before, apply, watch, take down.", no_args_is_help=True)

Template = Annotated[str, typer.Option(help="Name of the template; see infra/rendered/INDEX.md.")]
Stack = Annotated[str, typer.Option(help="Name of the CloudFormation stack.")]
Region = Annotated[str | None, typer.Option(help="AWS region.")]
File = Annotated[Path | None, typer.Option(help="Parameter file, as infra/rendered/*.example.json.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a parameter; repeatable.")]
Config = Annotated[Path | None, typer.Option(help="The model's config.json, to count contexts.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of one whole context.")]
ModelGib = Annotated[float | None, typer.Option(min=0.001, help="Model's size, where S3 does not tell.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


CONTEXT_TOKENS: Final = 8192


@app.command("plan")
def plan_verb(
    template: Template,
    stack: Stack = "strongroom",
    region: Region = None,
    parameters: File = None,
    given: Set = None,
    model_config: Config = None,
    context_tokens: Context = CONTEXT_TOKENS,
    model_gib: ModelGib = None,
    as_json: Json = False,
) -> None:
    """Check everything that can be known before anything is made."""
    from infra.deploy import memory, plan

    def verb(aws: Aws) -> Result:
        need = memory.read(model_config, context_tokens, model_gib)
        choices = _choices(template, stack, aws, parameters, given)
        return plan.examine(dataclasses.replace(choices, need=need), aws)

    _run("deploy plan", as_json, region, verb, plan.show)


@app.command()
def up(
    template: Template,
    stack: Stack = "strongroom",
    region: Region = None,
    parameters: File = None,
    given: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; change nothing.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Plan, then make or update the stack, and tell why it is not there yet."""
    from infra.deploy import plan
    from infra.deploy import stack as room

    def verb(aws: Aws) -> Result:
        choices = _choices(template, stack, aws, parameters, given)
        planned = plan.examine(choices, aws)
        if dry_run or not planned["ok"]:
            return planned
        _confirm(f"deploy {template} as {stack} in {aws.region}?", yes)
        return room.up(choices, aws, _say)

    def show(result: Result) -> None:
        plan.show(result) if "findings" in result else _show(result)

    _run("deploy up", as_json, region, verb, show)


@app.command()
def status(stack: Stack = "strongroom", region: Region = None, as_json: Json = False) -> None:
    """Tell the state of a stack, and why its endpoint is not in service."""
    from infra.deploy import stack as room

    _run("deploy status", as_json, region, lambda aws: room.status(stack, aws), _show)


@app.command()
def invoke(
    prompt: Annotated[str, typer.Option(help="Text of one user message.")],
    stack: Stack = "strongroom",
    region: Region = None,
    stream: Annotated[bool, typer.Option(help="Stream the answer.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    as_json: Json = False,
) -> None:
    """Call a stack's endpoint once."""
    from infra.deploy import stack as room

    def show(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    def verb(aws: Aws) -> Result:
        return room.invoke(stack, aws, prompt, max_tokens, stream, show)

    _run("deploy invoke", as_json, region, verb, lambda _: print())


@app.command()
def logs(
    stack: Stack = "strongroom",
    region: Region = None,
    lines: Annotated[int, typer.Option(min=1, max=10_000, help="How many lines.")] = 50,
    as_json: Json = False,
) -> None:
    """Print the container's last lines."""
    from infra.deploy import stack as room

    def show(result: Result) -> None:
        print(*result["lines"], sep="\n")

    _run("deploy logs", as_json, region, lambda aws: room.logs(stack, aws, lines), show)


@app.command()
def down(stack: Stack = "strongroom", region: Region = None, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a stack and list what stays."""
    from infra.deploy import stack as room

    def verb(aws: Aws) -> Result:
        _confirm(f"delete the stack {stack} in {aws.region}?", yes)
        return room.down(stack, aws, _say)

    _run("deploy down", as_json, region, verb, _show)


def _choices(template: str, stack: str, aws: Aws, file: Path | None, given: list[str] | None) -> Choices:
    from infra.deploy import choices

    return choices.read(template, stack, aws.region, file, given or [])


def _run(
    command: str,
    as_json: bool,
    region: str | None,
    verb: Callable[[Aws], Result],
    show: Callable[[Result], None],
) -> None:
    def opened() -> Result:
        from infra.deploy.aws import Aws, translated

        aws = Aws(region)
        try:
            with translated():
                return verb(aws)
        finally:
            aws.close()

    report.run(command, as_json, opened, show)


def _confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; raises CommandError where there is none or the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(ExitCode.USAGE, "not_confirmed", "nobody can be asked", "add --yes")
    if not typer.confirm(question, err=True):
        raise CommandError(ExitCode.INTERRUPTED, "not_confirmed", "nothing was done")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(result: dict[str, Any]) -> None:
    """Print a result as `name: value` lines, lists one item a line."""
    for name, value in result.items():
        if isinstance(value, list):
            for one in value:
                print(f"{name}: {', '.join(str(held) for held in one.values())}")
        elif isinstance(value, dict):
            for key, held in value.items():
                print(f"{key}: {held}")
        elif value != "":
            print(f"{name}: {value}")
