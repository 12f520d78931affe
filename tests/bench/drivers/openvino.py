"""OpenVINO GenAI: `ContinuousBatchingPipeline` on the model that `optimum-intel` exports with int8 weights.

Owns: its environment, the export, the calls. Must not know: other engines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.environments import Place, Ready, key_of
from tests.bench.figures import Timed
from tests.bench.protocol import serve
from tests.bench.stepping import run
from tests.bench.workloads import Request

NEED_MIB = 1500
SLOTS = 32
CACHE_GB = 1  # the least it takes; all workloads fit
GROUP = 64  # int4 only: divides the small models' widths, 128 does not


def set_up(model: Path, precision: str = "int8") -> Ready:
    place = Place("openvino")
    python = place.torch_environment("openvino-genai", "optimum-intel[openvino]")
    # An export of text needs neither; beside a CPU torch they may not even import.
    place.once("slim", lambda: place.pip("uninstall", "-y", "torchvision", "torchaudio"))
    out = place.folder / f"{key_of(model)}-{precision}"
    words = ["--task", "text-generation-with-past", "--weight-format", precision]
    words += ["--group-size", str(GROUP)] if precision == "int4" else []
    tool = place.python.with_name("optimum-cli")
    export: list[str | Path] = [tool, "export", "openvino", "--model", model, *words, out]
    place.once(f"export-{out.name}", lambda: place.run(*export, environment={"HF_HUB_OFFLINE": "1"}))
    notes = f"{precision} weights, exported by optimum-intel {place.version('optimum-intel')}"
    return Ready(python, out, {"precision": precision}, {"HF_HUB_OFFLINE": "1"}, notes)


class OpenVino:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.cache_size = SLOTS, CACHE_GB
        scheduler.enable_prefix_caching = True
        self._genai = genai
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU")
        self._serial = 0
        self._open: dict[int, Any] = {}
        return {"about": {"version": genai.get_version(), "precision": options["precision"]}}

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        return run(self, requests)

    def submit(self, number: int, request: Request) -> None:
        import numpy
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = request.output_tokens, True, False
        ids = openvino.Tensor(numpy.array([request.prompt], dtype=numpy.int64))
        self._serial += 1
        self._open[number] = self._pipeline.add_request(self._serial, ids, config)

    def step(self) -> Iterable[tuple[int, int, str]]:
        self._pipeline.step()
        for number, handle in list(self._open.items()):
            # status first: what is finished before the read below leaves nothing unread behind
            finished = handle.get_status() != self._genai.GenerationStatus.RUNNING
            tokens = 0
            while handle.can_read():
                tokens += sum(len(part.generated_ids) for part in handle.read().values())
            if finished:
                del self._open[number]
            yield number, tokens, ""

    def busy(self) -> bool:
        return bool(self._open)

    def close(self) -> None:
        self._pipeline = None


if __name__ == "__main__":
    sys.exit(serve(OpenVino()))
