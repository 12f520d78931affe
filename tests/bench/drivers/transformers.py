"""transformers, fp32: `generate` on a static batch, or its own continuous batching (option `batching`).

Owns: the environment both share, the calls. Must not know: other engines.
A static batch takes whoever has arrived, pads to the left, and ends when its longest member does; who comes
meanwhile waits for the next batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.environments import Place, Ready, compute_threads
from tests.bench.figures import Timed
from tests.bench.protocol import serve
from tests.bench.workloads import Request

NEED_MIB = 4000
PACKAGES = ("transformers==5.23.0", "accelerate", "psutil")
OPEN_S = 600.0
BLOCKS = 64  # of 256 tokens each; left alone it takes most of the machine's memory for KV
BATCH_TOKENS = 1024


def set_up(model: Path, batching: str = "static") -> Ready:
    place = Place("transformers")
    python = place.torch_environment(*PACKAGES)
    notes = f"fp32, {batching} batching"
    return Ready(python, model, {"batching": batching}, {"HF_HUB_OFFLINE": "1"}, notes)


class Transformers:
    def __init__(self) -> None:
        self._manager: Any = None

    def load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        import torch
        import transformers

        torch.set_num_threads(compute_threads())
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model.eval()
        self._continuous = options["batching"] == "continuous"
        if self._continuous:
            self._manager = self._start(transformers)
        self._serial = 0
        return {"about": {"version": transformers.__version__, "precision": "float32"}}

    def _start(self, transformers: Any) -> Any:
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = transformers.ContinuousBatchingConfig(num_blocks=BLOCKS, max_batch_tokens=BATCH_TOKENS)
        manager = self._model.init_continuous_batching(generation, batching)
        manager.start()
        return manager

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        with self._torch.inference_mode():
            return self._run_continuous(requests) if self._continuous else self._run_static(requests)

    def _run_static(self, requests: Sequence[Request]) -> list[Timed]:
        events: list[list[tuple[float, int]]] = [[] for _ in requests]
        left = sorted(range(len(requests)), key=lambda number: requests[number].at_s)
        began_s = time.perf_counter()
        while left:
            now_s = time.perf_counter() - began_s
            batch = [number for number in left if requests[number].at_s <= now_s]
            if not batch:
                time.sleep(requests[left[0]].at_s - now_s)
                continue
            self._generate([requests[number] for number in batch], [events[n] for n in batch], began_s)
            left = [number for number in left if number not in batch]
        return [Timed(tuple(each)) for each in events]

    def _generate(self, batch: list[Request], events: list[list[tuple[float, int]]], began_s: float) -> None:
        torch = self._torch
        longest = max(len(request.prompt) for request in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1

        def stamp(_ids: Any, _scores: Any, **_: Any) -> Any:
            now_s = time.perf_counter() - began_s
            for request, mine in zip(batch, events, strict=True):
                if len(mine) < request.output_tokens:
                    mine.append((now_s, 1))
            return torch.zeros(len(batch), dtype=torch.bool)

        most = max(request.output_tokens for request in batch)
        self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[stamp],
        )

    def _run_continuous(self, requests: Sequence[Request]) -> list[Timed]:
        first, began_s = self._serial, time.perf_counter()
        self._serial += len(requests)
        for number in sorted(range(len(requests)), key=lambda n: requests[n].at_s):
            request = requests[number]
            time.sleep(max(0.0, request.at_s - (time.perf_counter() - began_s)))
            self._manager.add_request(
                list(request.prompt),
                request_id=str(first + number),
                max_new_tokens=request.output_tokens,
                record_timestamps=True,
                eos_token_id=-1,
            )
        got = [Timed((), "no answer")] * len(requests)
        for _ in requests:
            result = self._manager.get_result(timeout=OPEN_S)
            if result is None:
                break
            times = [stamp - began_s for stamp in result.timestamps or ()]
            answer = Timed(tuple((at_s, 1) for at_s in times), result.error or "")
            got[int(result.request_id) - first] = answer
        return got

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=10)


if __name__ == "__main__":
    sys.exit(serve(Transformers()))
