"""The command behind `strongroom package quality`.

Owns: options, the order reference then variants, progress on stderr. Must not know: metrics.
Invariant: stdout gets one line of JSON at the end and nothing else; exit 2 for what the caller can mend.

    python -m container.model.quality --model DIRECTORY --out DIRECTORY [--variants A,B] [--text FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import transformers

from container.model import shape
from container.model.facts import ModelRefused
from container.model.load import LoadError, read_config
from container.model.quality import report as reporting
from container.model.quality import text as texts
from container.model.quality.measure import NotNative, Row, Variant, measure, open_variant, reference_row
from container.model.quality.report import Report
from container.model.shape import SizingError
from container.model.source import DirectorySource, SourceError

EXIT_USAGE: Final = 2
TOKENS: Final = 4096
VARIANTS: Final = {
    "bfloat16": Variant("bfloat16", dtype="bfloat16"),
    **{
        name: Variant(name, quantize=name)
        for name in ("int8-block", "bnb-int8", "fp8", "int4-block", "bnb-nf4")
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the report, print its JSON in one line; return the exit status."""
    options = _parse(argv)
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        return _fail(f"`--variants {unknown[0]}` is not a choice", "use some of " + ", ".join(VARIANTS))
    try:
        report = run(
            options.model, options.variants, options.text, options.tokens, options.threads, options.command
        )
    except (SourceError, LoadError, SizingError, ModelRefused, NotNative, texts.TextRefused) as error:
        message, _, hint = str(error).partition("\nhint: ")
        return _fail(message, hint)
    paths = reporting.write(report, options.out)
    shown = {"files": [str(path) for path in paths], "rows": [asdict(row) for row in report.rows]}
    print(json.dumps(shown, separators=(",", ":")), flush=True)
    return 0


def run(
    model: Path, variants: Sequence[str], text: Path | None, tokens: int, threads: int | None, command: str
) -> Report:
    """Return the report; raises what opening the model raises, NotNative and TextRefused."""
    source = DirectorySource(model)
    tokenizer = source.file("tokenizer.json")
    if tokenizer is None:
        raise texts.TextRefused("the model directory has no `tokenizer.json`")
    chosen = texts.default_text() if text is None else texts.read_text(text)
    limit = shape.window_tokens(read_config(source).get_text_config()) or texts.WINDOW_TOKENS
    windows = texts.windows(chosen, tokenizer, tokens, min(limit, texts.WINDOW_TOKENS))
    _progress("reference")
    reference = open_variant(
        source, Variant("reference", dtype="float32"), len(windows[0]), threads, lambda _: None
    )
    rows: list[Row] = [reference_row(reference, windows, "none")]
    rows.extend(
        measure(source, reference, [VARIANTS[name] for name in variants], windows, threads, _progress)
    )
    finished = Report(
        architecture=reference.architecture,
        parameters=reference.parameters,
        text=chosen.name,
        text_sha256=chosen.digest,
        window_tokens=len(windows[0]),
        positions=sum(len(window) for window in windows),
        reference=f"the unquantized weights computed in {reference.dtype}",
        machine=_machine(),
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        rows=tuple(rows),
    )
    reference.close()
    return finished


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="strongroom package quality", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", type=lambda names: names.split(","), default=list(VARIANTS))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    options.command = (
        f"strongroom package quality --tokens {options.tokens} --variants {','.join(options.variants)}"
    )
    return options


def _machine() -> dict[str, str | int]:
    flags = shape.cpu_flags()
    fastest = ("amx_int8", "avx512_vnni", "avx512f", "avx2", "asimddp")
    found = next((flag for flag in fastest if flag in flags), "baseline")
    return {"cpu": platform.machine(), "instructions": found, "threads": torch.get_num_threads()}


def _progress(name: str) -> None:
    print(f"quality: {name}", file=sys.stderr, flush=True)


def _fail(message: str, hint: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    raise SystemExit(main())
