"""Parts of a model made beforehand, beside it: where they lie, and the command that makes them.

Owns: the folder's name, making parts as a start with the same settings would.
Must not know: how parts are written and checked (shard_files), serving.
Invariant: a folder is there whole or not at all; what a start finds in it was made for its own choices and
from the weights beside it, or the start refuses. Where the weights have been taken away there is nothing to
compare with, and nothing else to serve; until then every start reads them once for their digest.

    DIRECTORY/parts/tp2-int8-block/   manifest.json, model-rank-0-of-2.safetensors, ...

    python -m container.model.parts --model DIRECTORY --tensor-parallel N [--quantize SCHEME] [--surgery on]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from container.model import shape, surgery
from container.model.load import LoadError, quiet, read_config
from container.model.preparation import Preparation, facts_of
from container.model.quantize_checkpoint import full_precision
from container.model.quantize_choose import SETTINGS, QuantizeRefused, Scheme
from container.model.shape import SizingError
from container.model.shard_files import MANIFEST, Manifest, save_shards
from container.model.source import PARTS, DirectorySource, SourceError

EXIT_USAGE: Final = 2
MAX_RANKS: Final = 64


def place(root: Path, size: int, scheme: Scheme) -> Path:
    """Return where the parts for `size` ranks in `scheme` lie under `root`."""
    return root / f"tp{size}-{scheme.value}"


def found(root: Path | None, size: int, scheme: Scheme) -> Path | None:
    """Return the folder of such parts, or None where nobody made them."""
    if root is None:
        return None
    folder = place(root, size, scheme)
    return folder if (folder / MANIFEST).is_file() else None


def make(
    model: Path, size: int, quantize: str, dtype: str = "auto", fuse: str = "auto"
) -> tuple[Path, Manifest]:
    """Write the parts of the model in directory `model`; return their folder and manifest.

    Raises SourceError, LoadError, SizingError, QuantizeRefused, OSError, and FileExistsError where they are
    there already.
    """
    quiet()
    number_format = shape.compute_dtype(dtype, shape.cpu_flags())
    source = full_precision(DirectorySource(model), number_format)
    prepared = Preparation(
        quantize, facts_of(read_config(source), number_format), surgery.parts(fuse), together=size > 1
    )
    folder = place(model / PARTS, size, prepared.choice.scheme)
    if folder.exists():
        raise FileExistsError(f"{folder.name} is there already")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    steps = prepared.steps
    try:
        manifest = save_shards(
            source,
            unfinished,
            size,
            number_format,
            prepared.recipe,
            steps.fuse if prepared.quantizes else lambda _: None,
            steps.quantize or (lambda _: None),
            _progress,
        )
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder, manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Make parts and print one line of JSON about them; return the exit status."""
    parser = argparse.ArgumentParser(prog="strongroom package shard", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tensor-parallel", type=int, required=True)
    parser.add_argument("--quantize", choices=SETTINGS, default="none")
    parser.add_argument("--surgery", choices=surgery.SETTINGS, default="auto")
    options = parser.parse_args(argv)
    if not 1 <= options.tensor_parallel <= MAX_RANKS:
        return _fail(f"`--tensor-parallel` is from 1 to {MAX_RANKS}")
    try:
        folder, manifest = make(
            options.model, options.tensor_parallel, options.quantize, fuse=options.surgery
        )
    except (SourceError, LoadError, SizingError, QuantizeRefused, OSError) as error:
        return _fail(str(error))
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    shown = {"folder": str(folder), "quantization": manifest.quantization, "part_bytes": sizes}
    print(json.dumps(shown, separators=(",", ":")), flush=True)
    return 0


def _progress(phrase: str) -> None:
    print(f"shard: {phrase}", file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    raise SystemExit(main())
