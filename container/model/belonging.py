"""Whether parts made beforehand are of the weights that they are sealed with: asked once, before the seal.

Owns: the comparison of every part's manifest with the weights, and the command for it.
Must not know: how parts are made or read, packages.
Invariant: what is answered was computed from the weights as they lie there now, not from names or times.

A start from plain files reads the weights for this; one from a sealed package would have to open them only to
compare. So the author compares, and seals the answer beside the parts (`parts/weights.sha256`): a start holds
each part that it reads against that.

    python -m container.model.belonging --model DIRECTORY --parts FOLDER [--parts FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from container.model.quantize_checkpoint import full_precision
from container.model.shard_files import MANIFEST, MAX_MANIFEST_BYTES
from container.model.source import DirectorySource, SourceError, source_sha256

EXIT_USAGE: Final = 2


def check(model: Path, folders: Sequence[Path]) -> str:
    """Return the digest of the weights in `model`, of which all parts below each of `folders` were made.

    Raises SourceError where some were not, or where there are no weights.
    """
    own = DirectorySource(model)
    weights = own.weights_sha256()
    if weights is None:
        raise SourceError("the model has no weights to hold its parts against")
    read = full_precision(own, torch.float32)  # which parts of a quantized checkpoint were cut from
    known = {source_sha256(own)} | (set() if read is own else {source_sha256(read)})
    for folder in folders:
        for path in sorted(folder.glob(f"*/{MANIFEST}")):
            if _made_from(path) not in known:
                raise SourceError(
                    f"the parts in `{path.parent.name}` were made from other weights\n"
                    "hint: remove them and make them again"
                )
    return weights


def _made_from(path: Path) -> Any:
    """Return what the manifest of some parts says they were made from."""
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise SourceError("a part's manifest is too large")
    try:
        return json.loads(path.read_bytes())["source_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SourceError("a part's manifest cannot be read") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the digest in one line of JSON; return the exit status."""
    parser = argparse.ArgumentParser(prog="strongroom package build", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--parts", type=Path, action="append", required=True)
    options = parser.parse_args(argv)
    try:
        weights = check(options.model, options.parts)
    except (SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(json.dumps({"weights_sha256": weights}, separators=(",", ":")), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
