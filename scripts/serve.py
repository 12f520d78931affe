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

from infra.emulator import FolderStore
from infra.emulator.server import Emulator
from scripts.demo import CACHE
from scripts.demo_model import NAME as DEMO
from scripts.demo_model import ensure_checkpoint
from scripts.demo_package import ensure_ready, sealed
from scripts.endpoint import Endpoint
from scripts.progress import progress, say


def main() -> int:
    """Serve until told to stop; return the server's exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve", description="serve the demo model in the foreground"
    )
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one")
    parser.add_argument(
        "--model", type=Path, help="a checkpoint directory, served as it is; default: the demo model, sealed"
    )
    parser.add_argument("--plain", action="store_true", help="serve the demo model as it is, not sealed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a STRONGROOM_ setting"
    )
    parser.add_argument(
        "--emulator", action="store_true", help="a local SageMaker runtime in front of it, too"
    )
    parser.add_argument(
        "--store",
        type=Path,
        help="with --emulator: a folder that stands for S3; adds demo-async and batch jobs",
    )
    options = parser.parse_args()
    environment = dict(pair.split("=", 1) for pair in options.set)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        model_dir = options.model
        if model_dir is None:
            with progress("preparing the model") as told:
                model_dir = ensure_checkpoint(CACHE, told)
                if not options.plain:
                    package = stack.enter_context(sealed(ensure_ready(model_dir, told), DEMO, told))
                    model_dir, environment = package.path, package.environment | environment
        endpoint = stack.enter_context(
            Endpoint(model_dir, port=options.port, environment=environment, progress=say)
        )
        ready: dict[str, object] = {
            "url": endpoint.url,
            "port": endpoint.port,
            "start_s": round(endpoint.start_s, 2),
        }
        if options.emulator:
            runtime = stack.enter_context(
                Emulator(
                    upstream=endpoint.upstream,
                    endpoint="demo",
                    store=FolderStore(options.store) if options.store else None,
                    async_output="s3://data/async" if options.store else None,
                )
            )
            ready["emulator"] = runtime.boto3_arguments()
            ready["openai"] = {"base_url": runtime.openai_base_url(), "api_key": runtime.token()}
        print(json.dumps(ready, separators=(",", ":")), flush=True)
        assert endpoint.process is not None
        while not stop.wait(0.5):
            if endpoint.process.poll() is not None:
                break
        return endpoint.stop()


if __name__ == "__main__":
    sys.exit(main())
