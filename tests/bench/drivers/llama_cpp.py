"""llama.cpp: its own `llama-server`, built on this machine for it, on a GGUF its own script converts.

Owns: the build from the sources that `llama-cpp-python` carries, the conversion, the server it starts.
Must not know: other engines. Weights: our safetensors checkpoint through `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.endpoint import free_port
from tests.bench.environments import TORCH, Place, Ready, SetupFailed, compute_threads, key_of
from tests.bench.figures import Timed
from tests.bench.http_load import Dialect, load
from tests.bench.protocol import serve
from tests.bench.workloads import WINDOW_TOKENS, Request

NEED_MIB = 1500
SOURCE = "llama-cpp-python==0.3.36"
SLOTS = 32
START_S = 120.0
TOOLS = ("cmake", "ninja", "transformers==5.23.0", "sentencepiece", "protobuf", "gguf")
SWITCHES = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
DIALECT = Dialect(
    "/completion",
    lambda request: {
        "prompt": list(request.prompt),
        "n_predict": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": True,
    },
    re.compile(rb'"content":"[^"]'),
    re.compile(rb'"tokens_predicted":(\d+)'),
)


def set_up(model: Path, precision: str = "q8_0") -> Ready:
    place = Place("llama.cpp")
    place.torch_environment(*TOOLS)
    place.once(f"source-{SOURCE}", lambda: _unpack(place))
    source = place.folder / "src" / "vendor" / "llama.cpp"
    place.once(f"build-{SOURCE}", lambda: _build(place, source))
    gguf = place.folder / f"{key_of(model)}-{precision}.gguf"
    convert = (
        place.python,
        source / "convert_hf_to_gguf.py",
        model,
        "--outtype",
        precision,
        "--outfile",
        gguf,
    )
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source / "gguf-py")}
    place.once(f"convert-{gguf.name}", lambda: place.run(*convert, environment=offline))
    notes = (
        f"{precision} by its own converter from the safetensors checkpoint; {SOURCE}, torch {TORCH} converts"
    )
    server = str(place.folder / "build" / "bin" / "llama-server")
    return Ready(place.python, gguf, {"server": server, "precision": precision}, {}, notes)


def _unpack(place: Place) -> None:
    place.pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(place.folder), SOURCE)
    archives = sorted(place.folder.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        raise SetupFailed("the source distribution was not downloaded")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(place.folder, filter="data")
    (place.folder / archives[-1].name.removesuffix(".tar.gz")).rename(place.folder / "src")


def _build(place: Place, source: Path) -> None:
    tool = place.python.with_name("cmake")
    path = {"PATH": f"{place.python.parent}:/usr/local/bin:/usr/bin:/bin"}
    switches = [f"-D{name}={value}" for name, value in SWITCHES.items()]
    place.run(tool, "-S", source, "-B", place.folder / "build", "-G", "Ninja", *switches, environment=path)
    place.run(tool, "--build", place.folder / "build", "-j1", "--target", "llama-server", environment=path)


class LlamaCpp:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        self._port = free_port()
        threads = str(compute_threads())
        words = [options["server"], "-m", model, "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["-np", str(SLOTS), "-c", str(SLOTS * WINDOW_TOKENS), "-t", threads, "-tb", threads]
        # a second copy of old prompts in memory cannot help: no round repeats another's
        words += ["--cache-ram", "0", "--no-ui"]
        self._process = subprocess.Popen(words, stdout=sys.stderr, stdin=subprocess.DEVNULL)
        ends_s = time.monotonic() + START_S
        while self._health() != 200:
            if self._process.poll() is not None or time.monotonic() > ends_s:
                raise RuntimeError(f"llama-server did not start ({self._process.poll()})")
            time.sleep(0.02)
        said = subprocess.run([options["server"], "--version"], capture_output=True, text=True, check=True)
        version = (said.stdout + said.stderr).strip().splitlines()[0]
        return {
            "about": {"version": version, "precision": options["precision"]},
            "roots": [self._process.pid],
        }

    def _health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        return asyncio.run(load(self._port, DIALECT, requests))

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)


if __name__ == "__main__":
    sys.exit(serve(LlamaCpp()))
