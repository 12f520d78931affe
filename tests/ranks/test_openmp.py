"""Compute threads sleep while they wait: told to the OpenMP runtime before torch loads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# `load` imports torch, then refuses the model; the runtime prints what it read from the environment.
LOAD = """
import sys
from container.ranks.assembly import StartFailed, load
from container.ranks.config import EngineConfig
try:
    load(EngineConfig(model_dir=sys.argv[1]), lambda phase: None)
except StartFailed:
    assert "torch" in sys.modules
"""


def wait_policy(model_dir: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(model_dir)],
        env={**inherited, "OMP_DISPLAY_ENV": "true", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    return line.partition("'")[2].rstrip("'")


def test_waiting_threads_sleep_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")  # looked for before anything is imported to read it
    assert wait_policy(tmp_path) == "PASSIVE"
    assert wait_policy(tmp_path, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
