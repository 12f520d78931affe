"""The verb that makes the privacy evidence, with the demo's sealed model unless another is named.

Owns: options and the JSON line at the end. Must not know: what is observed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from infra.image.serving import NOTHING
from infra.privacy import prove
from infra.release.openssl import SigningRefused
from scripts import demo, demo_image
from scripts.demo_model import ensure_checkpoint
from scripts.progress import progress, say


def main() -> int:
    """Prove; the last line of stdout is one JSON document. Returns 1 when something was found."""
    parser = argparse.ArgumentParser(prog="scripts/prove-privacy", allow_abbrev=False)
    parser.add_argument(
        "--image", default="", metavar="TAG", help="built where none is named and none is there"
    )
    parser.add_argument("--model", type=Path, help="a model that is not sealed; otherwise the demo's, sealed")
    parser.add_argument("--cache", type=Path, default=demo.CACHE, help="where the demo's model is kept")
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--calls", type=int, default=prove.CALLS)
    parser.add_argument("--canaries", type=int, default=prove.CANARIES)
    parser.add_argument("--idle", type=float, default=prove.IDLE_S, help="seconds before memory is searched")
    parser.add_argument("--key", type=Path, help="an Ed25519 private key (PEM) that signs the evidence")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it made goes with it
    if os.geteuid() != 0:
        print("error: only root can watch a network\nhint: run it with sudo", file=sys.stderr)
        return 3
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            model = demo_image.Model(chosen.model) if chosen.model else sealed(stack, chosen.cache)
            mounts, environment = stack.enter_context(demo_image.key_of(model, demo_image.SERVICE))
            told = prove.Told(
                image=chosen.image or demo_image.available(),
                model=model.path.resolve(),
                environment=environment or NOTHING,
                mounts=mounts,
                out=chosen.out,
                calls=chosen.calls,
                canaries=chosen.canaries,
                idle_s=chosen.idle,
                key=chosen.key,
                command=" ".join(["scripts/prove-privacy", *sys.argv[1:]]),
            )
            evidence = prove.prove(told, say)
    except (*demo_image.FAILURES, SigningRefused) as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 3
    found = {
        name: {str(one["number"]): one["findings"] for one in run["detectors"] if not one["passed"]}
        for name, run in evidence["runs"].items()
    }
    line = {
        "ok": evidence["ok"],
        "image_id": evidence["subject"]["image id"],
        "report": str(chosen.out / prove.PAGE_NAME),
        "found": {name: findings for name, findings in found.items() if findings},
        "total_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line, separators=(",", ":")))
    return 0 if evidence["ok"] else 1


def sealed(stack: contextlib.ExitStack, cache: Path) -> demo_image.Model:
    """Return the demo's model as a sealed package that goes with `stack`."""
    with progress("preparing the model") as told:
        checkpoint = ensure_checkpoint(cache, told)
    package = stack.enter_context(demo.packed(checkpoint))
    return demo_image.Model(package.path, package.key, package.environment)


if __name__ == "__main__":
    sys.exit(main())
