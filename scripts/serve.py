"""The demo endpoint in the foreground, for anyone to call or attack.

Prints one JSON line with its addresses once it is healthy, then serves until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from pathlib import Path

from infra.emulator.server import Emulator
from scripts.demo import CACHE
from scripts.demo_model import ensure_checkpoint
from scripts.endpoint import Endpoint
from scripts.progress import progress, say


def main() -> int:
    """Serve until told to stop; return the server's exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve", description="serve the demo model in the foreground"
    )
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one")
    parser.add_argument("--model", type=Path, help="a checkpoint directory; default: the demo model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a STRONGROOM_ setting"
    )
    parser.add_argument(
        "--emulator", action="store_true", help="a local SageMaker runtime in front of it, too"
    )
    options = parser.parse_args()
    environment = dict(pair.split("=", 1) for pair in options.set)
    model_dir = options.model
    if model_dir is None:
        with progress("preparing the model") as told:
            model_dir = ensure_checkpoint(CACHE, told)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(
            Endpoint(model_dir, port=options.port, environment=environment, progress=say)
        )
        ready: dict[str, object] = {
            "url": endpoint.url,
            "port": endpoint.port,
            "start_s": round(endpoint.start_s, 2),
        }
        if options.emulator:
            runtime = stack.enter_context(Emulator(upstream=f"127.0.0.1:{endpoint.port}", endpoint="demo"))
            ready["emulator"] = runtime.boto3_arguments()
        print(json.dumps(ready, separators=(",", ":")), flush=True)
        assert endpoint.process is not None
        while not stop.wait(0.5):
            if endpoint.process.poll() is not None:
                break
        return endpoint.stop()


if __name__ == "__main__":
    sys.exit(main())
