"""Our engine in process: container.engine.engine.Engine over container.model.start.build_runner.

Owns: the loop that a rank's host runs, without sockets and with a clock. Must not know: other engines, HTTP.
The one file here, with `ours_steps`, that reaches into the rooms: tests/test_arrows.py says so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import Timed
from tests.bench.protocol import serve
from tests.bench.stepping import run
from tests.bench.workloads import WINDOW_TOKENS, Request

CONNECTION = 1
SHARE_PROMPT, SHARE_OUTPUT = 32, 48  # tokens: mostly steps in which every sequence decodes
MODEL_SETTINGS = {"quantize", "dtype", "kv_dtype", "threads"}
KNOWN = MODEL_SETTINGS | {"running_limit", "step_tokens", "sequence_tokens", "kv_mib"}
PARTS = "parts"  # what was made of the model beforehand lies there


class Ours:
    """Loads once, serves run after run; the prefix cache stays as it is between runs."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._runner: Any = None
        self._model = ""
        self._options: dict[str, Any] = {}
        self._serial = self._first = 0

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine process sets it, before torch
        from container.engine.engine import Engine, EngineLimits

        self._model, self._options = model, options
        self._runner, facts = build({"sequence_tokens": WINDOW_TOKENS} | options, model)
        self._engine = Engine(self._runner, EngineLimits(waiting=4096, waiting_s=3600.0))
        about = {
            "precision": facts.quantize if facts.quantize != "none" else facts.dtype,
            "runner": facts.runner,
            "quantized": facts.quantized,
            "dtype": facts.dtype,
            "native": native_libraries(),
        }
        if facts.operators == "fused":
            about["step_bytes"] = self._runner.packed.step_bytes
        return {"about": about, "phases": facts.seconds}

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        self._first = self._serial
        self._serial += len(requests)
        return run(self, requests)

    def submit(self, number: int, request: Request) -> None:
        from container.engine.request import EngineRequest, RequestKey, SamplingParams

        key = RequestKey(CONNECTION, self._first + number)
        greedy = SamplingParams(temperature=0.0)
        # no stop ids: end-of-text is a token like any other, so that lengths are exact
        self._engine.submit(EngineRequest(key, array("i", request.prompt), request.output_tokens, greedy))

    def step(self) -> Iterable[tuple[int, int, str]]:
        for delta in self._engine.step():
            yield (
                delta.key.id - self._first,
                len(delta.tokens),
                "" if delta.error is None else delta.error.value,
            )

    def busy(self) -> bool:
        return bool(self._engine.has_work)

    def steps(self, points: list[tuple[int, int]]) -> list[dict[str, float]]:
        """Return the time of steps at each (batch, context) on a runner of their own."""
        from tests.bench.drivers.ours_steps import ROOM, measure

        self.close()
        batch, context = max(b for b, _ in points), max(c for _, c in points)
        wide = {"running_limit": batch, "sequence_tokens": context + ROOM, "kv_mib": None}
        self._runner, _ = build(self._options | wide, self._model, prefix_cache=False)
        return measure(self._runner, points)

    def share(self, sequences: int) -> dict[str, float]:
        """Return what part of a step is the engine's own work, the scheduler's above all, at `sequences`."""
        from container.engine.engine import Engine, EngineLimits
        from tests.bench.drivers.ours_steps import Watched, share_of

        self.close()
        wide = {"running_limit": sequences, "sequence_tokens": 512, "kv_mib": None}
        self._runner, _ = build(self._options | wide, self._model)
        watched = Watched(self._runner)
        self._engine = Engine(watched, EngineLimits(waiting=4096, waiting_s=3600.0))
        text = range(3, 3 + sequences * SHARE_PROMPT)
        most = watched.capacity().vocabulary
        asked = [
            Request(
                tuple(3 + i * 31 % (most - 3) for i in text[n * SHARE_PROMPT :][:SHARE_PROMPT]), SHARE_OUTPUT
            )
            for n in range(sequences)
        ]
        return share_of(watched, lambda: self.run(asked), sequences)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = self._engine = None


def native_libraries() -> list[str]:
    """Return the compiled libraries that lie beside the kernels in use; none: the plain forms run."""
    found = importlib.util.find_spec("container.kernels")
    folders = found.submodule_search_locations if found else None
    return sorted(path.name for folder in folders or () for path in Path(folder).glob("*.so"))


def build(options: dict[str, Any], model: str, *, prefix_cache: bool = True) -> tuple[Any, Any]:
    """Return runner and facts for `options`, named as the fields of RunnerConfig; raises ValueError."""
    from container.model.shape import RunnerConfig
    from container.model.source import DirectorySource
    from container.model.start import build_runner

    if unknown := set(options) - KNOWN:
        raise ValueError(f"unknown options: {', '.join(sorted(unknown))}")
    parts = Path(model, PARTS)
    config = RunnerConfig(
        prefix_cache=prefix_cache, parts_dir=str(parts) if parts.is_dir() else None, **options
    )
    return build_runner(config, DirectorySource(Path(model)), lambda phase: None)


if __name__ == "__main__":
    sys.exit(serve(Ours()))
