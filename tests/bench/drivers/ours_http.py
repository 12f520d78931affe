"""Our endpoint as anyone gets it: started with its defaults, called over HTTP with streaming.

Owns: the server it starts. Must not know: anything of the rooms; it speaks HTTP.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import Timed
from tests.bench.http_load import Dialect, load
from tests.bench.protocol import serve
from tests.bench.workloads import Request


def _body(request: Request) -> dict[str, Any]:
    return {
        "prompt": list(request.prompt),
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


DIALECT = Dialect(
    "/v1/completions", _body, re.compile(rb'"text":"[^"]'), re.compile(rb'"completion_tokens":(\d+)')
)


class OursOverHttp:
    """Options are settings of the endpoint without their prefix, in small letters: `quantize`, `threads`."""

    def __init__(self) -> None:
        self._endpoint: Any = None

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        from scripts.endpoint import Endpoint

        settings = {f"STRONGROOM_{name.upper()}": str(value) for name, value in options.items()}
        began_s, began_at = time.monotonic(), time.time()
        phases: dict[str, float] = {}

        def heard(line: str) -> None:
            phases[line.removeprefix("server: ")] = round(time.monotonic() - began_s, 3)

        with tempfile.TemporaryFile("w+") as log:
            endpoint = Endpoint(Path(model), environment=settings, progress=heard, log=log)
            self._endpoint = endpoint.__enter__()
            log.seek(0)
            told = events_of(log.read(), began_at)
        phases |= told | {"first 200 on /ping": round(endpoint.start_s, 3)}
        assert endpoint.process is not None
        about = {"precision": str(options.get("quantize", "auto")), "transport": "http"}
        return {"about": about, "phases": phases, "roots": [endpoint.process.pid]}

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        return asyncio.run(load(self._endpoint.port, DIALECT, requests))

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.stop()
            self._endpoint = None


def events_of(log: str, began_at: float) -> dict[str, float]:
    """Return event of the server's log -> seconds after `began_at` (seconds since 1970) of its last line."""
    found: dict[str, float] = {}
    for line in log.splitlines():
        if line.startswith('{"time":'):
            entry = json.loads(line)
            child = f" {entry['child']}" if "child" in entry else ""
            found[f"log: {entry['event']}{child}"] = round(entry["time"] - began_at, 3)
    return found


if __name__ == "__main__":
    sys.exit(serve(OursOverHttp()))
