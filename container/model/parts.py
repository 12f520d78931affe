"""Parts of a model made beforehand, beside it: where they lie, and the command that makes them.

Owns: the folder's name, making parts as a start with the same settings would.
Must not know: how parts are written and checked (shard_files), serving.
Invariant: a folder is there whole or not at all; what a start finds in it was made for its own choices and
from the weights beside it, or the start refuses. Where the weights have been taken away there is nothing to
compare with, and nothing else to serve; until then every start reads them once for their digest.
What is written does not depend on the dtype that the machine computes in: a start in bfloat16 quantizes what
it has rounded, parts of a float32 checkpoint are quantized from weights that nobody rounded.

    DIRECTORY/parts/tp2-int8-block/     manifest.json, model-rank-0-of-2.safetensors, ...
    DIRECTORY/parts/ready-int8-block/   manifest.json, decoder.safetensors: one rank on the fused operators
    DIRECTORY/parts/ready-int4-block/   the same

    python -m container.model.parts --model DIRECTORY --tensor-parallel N [--quantize SCHEME] [--surgery on]
        [--out DIRECTORY]  the folder of parts instead of DIRECTORY/parts
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from container.model import ready, ready_make, shape, surgery
from container.model.folders import Folder
from container.model.load import LoadError, quiet, read_config
from container.model.preparation import Preparation, compute_dtype, facts_of
from container.model.quantize_checkpoint import full_precision
from container.model.quantize_choose import IN_BLOCKS, SETTINGS, QuantizeRefused, Scheme
from container.model.shape import SizingError
from container.model.shard_files import MANIFEST, MAX_MANIFEST_BYTES, save_shards
from container.model.source import PARTS, DirectorySource, ModelSource, SourceError

EXIT_USAGE: Final = 2
CONFIG: Final = "config.json"
MAX_RANKS: Final = 64


def name_of(size: int, scheme: Scheme) -> str:
    """Return the folder's name of the parts for `size` ranks in `scheme`."""
    return f"tp{size}-{scheme.value}"


def found(root: Folder | None, size: int, scheme: Scheme) -> Folder | None:
    """Return the folder of such parts, or None where nobody made them; raises SourceError."""
    if root is None:
        return None
    folder = root.folder(name_of(size, scheme))
    return None if folder.file(MANIFEST, MAX_MANIFEST_BYTES) is None else folder


@dataclass(frozen=True, slots=True)
class Made:
    """What `make` made, and where."""

    folder: Path
    quantization: str


def make(
    model: Path, size: int, quantize: str, dtype: str = "auto", fuse: str = "auto", out: Path | None = None
) -> Made:
    """Make the parts of the model in directory `model`, in `out` or, without it, in the folder beside it.

    A lone rank whose model runs on the fused operators gets a ready decoder (see ready_files), any other its
    state dict (see shard_files), stored in `dtype`; `auto` is `stored_dtype`. Raises SourceError, LoadError,
    SizingError, QuantizeRefused, OSError, and FileExistsError where they are there already.
    """
    quiet()
    own, root = DirectorySource(model), out or model / PARTS
    stored = stored_dtype(own) if dtype == "auto" else shape.compute_dtype(dtype, frozenset())
    source = full_precision(own, stored)
    computed = compute_dtype(dtype, quantize, own, alone=size == 1)  # what a start here chooses a scheme for
    prepared = Preparation(
        quantize, facts_of(read_config(source), computed), surgery.parts(fuse), together=size > 1
    )
    scheme = prepared.choice.scheme
    if size == 1 and scheme in IN_BLOCKS and fuse != "on":
        ready_folder = root / ready.FOLDERS[scheme.value]
        with _appearing(ready_folder, model) as unfinished:
            made_ready = ready_make.make(own, scheme, unfinished, _progress) is not None
        if made_ready:
            return Made(ready_folder, scheme.value)
    folder = root / name_of(size, scheme)
    steps = prepared.steps
    with _appearing(folder, model) as unfinished:
        save_shards(
            source,
            unfinished,
            size,
            stored,
            prepared.recipe,
            steps.fuse if prepared.quantizes else lambda _: None,
            steps.quantize or (lambda _: None),
            _progress,
        )
    return Made(folder, scheme.value)


def stored_dtype(source: ModelSource) -> torch.dtype:
    """Return the dtype in which parts hold every value of the checkpoint as it is; raises SourceError.

    bfloat16 where all its weights are; else float32, which holds those of float16 and what is computed of
    quantized ones, too.
    """
    kinds = {tensor.read().dtype for _, tensor in source.stored()}
    floating = {kind for kind in kinds if kind.is_floating_point}
    return torch.bfloat16 if floating == {torch.bfloat16} else torch.float32


@contextmanager
def _appearing(folder: Path, model: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the work in it is done and has left something.

    Whoever may read the model's configuration may read its parts.
    """
    if folder.exists():
        raise FileExistsError(f"{folder.name} is there already")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.iterdir():
            shutil.copymode(model / CONFIG, path)
        if any(unfinished.iterdir()):
            unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make parts and print one line of JSON about them; return the exit status."""
    parser = argparse.ArgumentParser(prog="strongroom package shard", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tensor-parallel", type=int, required=True)
    parser.add_argument("--quantize", choices=SETTINGS, default="none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--surgery", choices=surgery.SETTINGS, default="auto")
    options = parser.parse_args(argv)
    if not 1 <= options.tensor_parallel <= MAX_RANKS:
        return _fail(f"`--tensor-parallel` is from 1 to {MAX_RANKS}")
    try:
        made = make(
            options.model,
            options.tensor_parallel,
            options.quantize,
            fuse=options.surgery,
            out=options.out,
        )
    except (SourceError, LoadError, SizingError, QuantizeRefused, OSError) as error:
        return _fail(str(error))
    sizes = [path.stat().st_size for path in sorted(made.folder.glob("*.safetensors"))]
    shown = {"folder": str(made.folder), "quantization": made.quantization, "part_bytes": sizes}
    print(json.dumps(shown, separators=(",", ":")), flush=True)
    return 0


def _progress(phrase: str) -> None:
    print(f"shard: {phrase}", file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    raise SystemExit(main())
