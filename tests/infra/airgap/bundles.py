"""What the tests of the bundle share: names, a way to call a script, a stand-in for docker."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from infra.airgap import save

BIN = save.HERE / "bin"
BUNDLE = "strongroom-1-cpu-linux-amd64-airgap"
MODEL = {"manifest.json": b"{}", "weights.sealed": os.urandom(4096), "nested/part-000": b"part"}


def sh(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(BIN / script), *map(str, arguments)]
    env = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)


DOCKER = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$1 $2" in
"version --format") echo "${ARCH:-amd64}" ;;
"info --format") echo /tmp ;;
"image inspect")
  shift 4
  if [ -f "$STATE/$1" ]; then cat "$STATE/$1"; else exit 1; fi ;;
"load ") cat >/dev/null; echo "$LOADS" >"$STATE/strongroom:1-cpu" ;;
"tag "*) cp "$STATE/previous" "$STATE/$3" 2>/dev/null || true; echo "$2" >"$STATE/$3" ;;
esac
"""


class Docker:
    """The stand-in: what it holds, what it was told."""

    def __init__(self, folder: Path, loads: str) -> None:
        self.state = folder / "state"
        self.state.mkdir()
        self._calls = folder / "calls"
        self._calls.touch()
        program = folder / "docker"
        program.write_text(DOCKER)
        program.chmod(0o755)
        self.environment = {
            "DOCKER": str(program),
            "CALLS": str(self._calls),
            "STATE": str(self.state),
            "LOADS": loads,
        }

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    def holds(self) -> dict[str, str]:
        return {path.name: path.read_text().strip() for path in self.state.iterdir()}
