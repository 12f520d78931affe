"""The verbs of `scripts/bench`: serve, peers, compare, gpu.

Owns: the command line, where a result goes, what the terminal shows. Must not know: how anything is measured.
The last line of stdout is one compact JSON document.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.progress import progress, say
from tests.bench import compare, gpu, machine, peers, plots, report, seeded, serve
from tests.bench.protocol import ROOT
from tests.bench.rounds import FOREIGN_LIMIT

RESULTS = ROOT / "tests" / "bench" / "results"
QUICK_RESULTS = ROOT / ".cache" / "bench" / "results"  # not for the repository: too short to mean anything
SEEDED = "seeded:"
FEWEST_ROUNDS = 3  # medians of fewer are not stated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns 1 when an engine of ours failed or nothing could be measured."""
    options = parse(arguments)
    if options.verb == "gpu":
        return on_device(options)
    plan = plan_of(options)
    if options.verb == "serve":
        document = serve.run(plan, say)
    elif options.verb == "peers":
        document = peers.run(plan, options.peers, say)
    else:
        document = compare.run(plan, (options.a, options.b), say)
    document = {**machine.provenance(options.verb), **settings_of(plan), **document}
    document["summary"] = report.summary(document["records"])
    folder = folder_of(options, plan)
    report.write(folder, document)
    document["plots"] = plots.draw(folder, document)
    document["result"] = str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name
    show(document)
    document["ok"] = ok(document)
    keys = ("ok", "verb", "model", "date", "versions", "summary", "ratios", "bounds", "terms")
    keys += ("failures", "result")
    print(report.last_line({**document, "terms": terms_of(document)}, keys))
    return 0 if document["ok"] else 1


def on_device(options: argparse.Namespace) -> int:
    """Run the device's parts; returns 1 when none of them gave figures."""
    document = gpu.run(options.device, tiny=options.tiny, told=say)
    folder = options.out or (QUICK_RESULTS if options.tiny else RESULTS) / f"gpu-{options.device}"
    report.write(folder, document)
    document["plots"] = gpu.draw(folder, document)
    print(gpu.table(document))
    document["ok"] = bool(document["sections"]) and not document["failures"]
    keys = ("ok", "verb", "device", "date", "versions", "verdicts", "seconds", "failures")
    print(report.last_line(document, keys))
    return 0 if document["ok"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a verb; ends the process on a wrong one, as argparse does."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="measure, side by side")
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = {
        name: verbs.add_parser(name, help=text)
        for name, text in (
            ("serve", "our workloads W1-W7, in process and over HTTP"),
            ("peers", "beside other engines, each in its own environment"),
            ("compare", "two commits of this repository"),
        )
    }
    for name, verb in made.items():
        verb.add_argument("--model", help=f"a checkpoint directory, or {_seeded()}; default: the demo model")
        verb.add_argument(
            "--quantize", action="append", help="may be given several times; default: int8-block"
        )
        known = serve.ALL if name == "serve" else (*serve.IN_PROCESS, *(("W7",) if name == "peers" else ()))
        verb.add_argument("--workloads", type=_names(known), default=known, help=f"of {','.join(known)}")
        verb.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, help="medians are of this many")
        verb.add_argument("--quick", action="store_true", help="short forms, one round: does it work at all")
        verb.add_argument("--out", type=Path, help="folder of the result; default: under tests/bench/results")
    made["peers"].add_argument(
        "--peers", type=_names(tuple(peers.PEERS)), default=peers.USUAL, help=f"of {','.join(peers.PEERS)}"
    )
    device = verbs.add_parser("gpu", help="all that needs an accelerator, within 8 minutes of its time")
    device.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device.add_argument("--tiny", action="store_true", help="smallest sizes: does it work at all")
    device.add_argument("--out", type=Path, help="folder of the result; default: under tests/bench/results")
    made["compare"].add_argument("a", help="a commit")
    made["compare"].add_argument("b", help="the commit it is measured against")
    options = parser.parse_args(arguments)
    if options.verb == "gpu":
        return options
    asked = (options.model or "").removeprefix(SEEDED)
    if asked != (options.model or "") and asked not in seeded.SHAPES:
        parser.error(f"--model: no such seeded model; choose {_seeded()}")
    if options.rounds < FEWEST_ROUNDS and not options.quick:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS} (or give --quick)")
    return options


def _seeded() -> str:
    return " or ".join(SEEDED + name for name in seeded.SHAPES)


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        given = tuple(part for part in text.split(",") if part)
        if not given or set(given) - set(known):
            raise argparse.ArgumentTypeError(f"choose from {','.join(known)}")
        return given

    return names


def plan_of(options: argparse.Namespace) -> serve.Plan:
    """Return what is to be measured; converts the demo model the first time it is needed."""
    return serve.Plan(
        model=model_of(options.model).absolute(),
        quantize=tuple(options.quantize or ("int8-block",)),
        workloads=options.workloads,
        rounds=1 if options.quick else options.rounds,
        quick=options.quick,
        logs=ROOT / ".cache" / "bench" / "logs",
    )


def model_of(given: str | None) -> Path:
    """Return the checkpoint directory that `--model` names; what has to be made is made once."""
    name = None if given is None else given.removeprefix(SEEDED)
    if given is not None and name == given:
        return Path(given)
    from scripts.demo import CACHE
    from scripts.demo_model import ensure_checkpoint

    with progress("preparing the model") as told:
        demo = ensure_checkpoint(CACHE, told)
    return demo if name is None else seeded.ensure(name, demo, CACHE)


def settings_of(plan: serve.Plan) -> dict[str, Any]:
    """Return the part of the document that says what was run."""
    return {
        "model": plan.model.name,
        "quantize": list(plan.quantize),
        "workloads": list(plan.workloads),
        "rounds": plan.rounds,
        "quick": plan.quick,
        "foreign_limit": FOREIGN_LIMIT,
    }


def folder_of(options: argparse.Namespace, plan: serve.Plan) -> Path:
    """Return where the result goes."""
    if options.out is not None:
        return Path(options.out).absolute()
    name = re.sub(r"-[0-9a-f]{16}-v\d+$", "", plan.model.name)
    return (QUICK_RESULTS if plan.quick else RESULTS) / f"{options.verb}-{name}"


def terms_of(document: dict[str, Any]) -> dict[str, Any]:
    return {engine: part["terms"] for engine, part in document.get("steps", {}).items()}


def ok(document: dict[str, Any]) -> bool:
    """Return whether something was measured and every engine of ours got through."""
    own = [r for r in document["records"] if r["engine"].startswith(("strongroom", "A ", "B "))]
    failed = any("error" in r for r in own) or any(n.startswith("strongroom") for n in document["failures"])
    measured = own or document.get("starts") or document.get("steps") or document.get("open_loop")
    return bool(measured) and not failed


def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    if document["summary"]:
        print(report.table(document["summary"], document["told"]))
    if document.get("ratios"):
        print("\n" + report.ratio_table(document["ratios"]))
    for lines in report.extras(document):
        print("\n" + lines)
    for name, reason in document["failures"].items():
        print(f"\nleft out or failed: {name}: {machine.plain(reason)}")
    print(f"\nresult and plots: {document['result']}")


if __name__ == "__main__":
    sys.exit(main())
