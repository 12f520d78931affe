"""`python -m tests.infra.sdk`: runs the SDK examples in their own environment and writes `infra/SDK.md`.

Owns: the environment, the page. Must not know: what an example does.
Invariant: the page holds what a run gave, with its date and versions; the last line of stdout is one JSON
object. With `--python PATH` that interpreter is used and none is set up; without `--image` local mode is
left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.environments import Place

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "infra" / "SDK.md"
PINNED = "sagemaker-core==2.27.0"
LIMIT_S = 600
HEAD = """# The SageMaker Python SDK, version 3

`pip install 'strongroom[sdk]'` brings `sagemaker-core`, the part of the SDK that
[the examples](examples/sdk_v3.py) use; the whole SDK (`sagemaker`) contains it and was not run. Our own code
never imports either.

`scripts/check-sdk` runs every example in an environment of its own: control calls against a stand-in that
refuses what the service model or our rules refuse, runtime calls through the local runtime with signatures
verified. It is no part of the ordinary suite: the environment is large and takes minutes to set up. The
last run:
"""
TAIL = """
## Known faults of the SDK

| fault | instead |
|---|---|
| `invoke_with_response_stream` raises AttributeError before the first part | boto3, or the OpenAI route |
| `invoke_async` lacks `Filename`, `S3OutputPathExtension`, `Body`; `invoke` lacks `PrefixAwareId` | boto3 |
| `from sagemaker.core.shapes import *` hides `sagemaker.core.resources.Model` | import names one by one |

## Local mode

`LocalSession` runs the image itself, as [local_mode.py](../tests/infra/sdk/local_mode.py) does. It needs
Docker and its compose (`docker-compose` 1.29 does), takes port 8080 and gives a start two minutes; its schema
refuses the setting that would raise them. It hands the caller's AWS keys to the container: run it with dummy
ones.

On 2026-11-23 an image of version 0.1.0 with SmolLM2-135M-Instruct answered an endpoint's call (24 s with
start and end) and a batch of two lines (17 s). Three later runs failed: twice the image had gone, and in the
last the machine stood still for longer than the two minutes. With `--image` the script adds its own rows.
"""


def page(result: dict[str, Any], date: str) -> str:
    """Return the page for a run's result."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    rows = [
        f"| {one['example']} | {'passed' if one['ok'] else 'FAILED'} | {one['told']} |"
        for one in result["rows"]
    ]
    table = [
        "",
        f"{date}: {versions}.",
        "",
        "| example | result | |",
        "|---|---|---|",
        *rows,
    ]
    return HEAD + "\n".join(table) + "\n" + TAIL


def run(words: list[Any], environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Return a child's exit status and the JSON object on its last line."""
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, result


def main() -> int:
    """Run, write the page; 1 when an example failed."""
    parser = argparse.ArgumentParser(prog="scripts/check-sdk", description="run the SDK examples")
    parser.add_argument("--python", type=Path, help="an interpreter that has the SDK, msgspec and typer")
    parser.add_argument("--image", help="the built image: local mode is run with it")
    parser.add_argument("--model", type=Path, help="a model directory that any user can read, with --image")
    given = parser.parse_args()
    root = Path(os.environ.get("STRONGROOM_SDK_CACHE") or ROOT / ".cache" / "sdk")
    python = given.python or Place("sdk", root).environment((PINNED, "msgspec>=0.22", "typer>=0.29"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = {**clean, "PYTHONPATH": str(ROOT), "AWS_DEFAULT_REGION": "us-east-1"}
    status, result = run([python, "-m", "tests.infra.sdk.examples"], environment)
    if given.image:
        words = [python, "-m", "tests.infra.sdk.local_mode", given.image, given.model]
        local_status, local = run(words, environment)
        status, result["rows"] = status or local_status, result["rows"] + local["rows"]
    PAGE.write_text(page(result, f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"), encoding="utf-8")
    print(json.dumps({"ok": status == 0, **result}))
    return status


if __name__ == "__main__":
    sys.exit(main())
