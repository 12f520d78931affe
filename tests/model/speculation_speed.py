"""What guessing ahead gains: the same requests with and without it, in turn, in one process on one model.

`python -m tests.model.speculation_speed CHECKPOINT [--pairs N] [--new N] [--running N] [--quantize SCHEME]`
prints, for a load that repeats itself and one that does not, the ratio of plain to guessing time (above 1,
guessing pays), CPU and wall, median over neighbouring runs, and how many drafts held.

`... CHECKPOINT --same N` instead counts on how many of N prompts greedy output is the same either way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from container.engine.engine import Engine
from container.engine.request import EngineRequest, SamplingParams
from container.engine.step import Capacity, Runner, StepPlan, StepResult
from container.model.shape import RunnerConfig
from container.model.source import DirectorySource
from container.ranks.assembly import DRAFT_TOKENS
from tests.model.serving import PATIENT, Answers, ask, native_runner, real_text, serve

PASSAGE = 160  # tokens that a repeating prompt holds twice, the second time in part
BEGUN = 24


@dataclass
class Guessing:
    """A runner that verifies `drafts` tokens at most. Engines take turns on it, so nothing is shared."""

    runner: Runner
    drafts: int

    def capacity(self) -> Capacity:
        return replace(self.runner.capacity(), draft_tokens=self.drafts, prefix_cache=False)

    def run(self, plan: StepPlan) -> StepResult:
        return self.runner.run(plan)

    def reset(self) -> None:
        self.runner.reset()

    def close(self) -> None:
        self.runner.close()


def repeating(text: Sequence[int], number: int, new: int) -> EngineRequest:
    """A passage and its beginning: the model goes on with the passage."""
    passage = list(text[number * 997 : number * 997 + PASSAGE])
    return ask(number, passage + passage[:BEGUN], new)


def wandering(text: Sequence[int], number: int, new: int) -> EngineRequest:
    """Real text, continued by draws at temperature 1: nothing is said twice on purpose."""
    prompt = text[number * 997 : number * 997 + PASSAGE + BEGUN]
    return ask(number, prompt, new, SamplingParams(temperature=1.0, seed=number))


def short(text: Sequence[int], number: int, new: int) -> EngineRequest:
    """A greedy request; every other prompt says part of itself twice."""
    prompt = text[number * 241 : number * 241 + 20 + number % 13]
    return ask(number, prompt + prompt[:12] if number % 2 else prompt, new)


def timed(engine: Engine, requests: Sequence[EngineRequest]) -> tuple[Answers, float, float]:
    """Return the answers with CPU and wall seconds."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    answers = serve(engine, requests)
    return answers, time.process_time() - cpu_s, time.perf_counter() - wall_s


def compare(runner: Runner, load: Sequence[Sequence[EngineRequest]]) -> str:
    """Run each group of requests both ways, in turn; return the line about it."""
    cpu, wall, same, asked, held, made = [], [], 0, 0, 0, 0
    for turn, requests in enumerate(load):
        engines = [Engine(Guessing(runner, drafts), PATIENT) for drafts in (0, DRAFT_TOKENS)]
        order = (0, 1) if turn % 2 else (1, 0)
        found = {which: timed(engines[which], requests) for which in order}
        cpu.append(found[0][1] / found[1][1])
        wall.append(found[0][2] / found[1][2])
        same += sum(found[0][0][n].tokens == answer.tokens for n, answer in found[1][0].items())
        asked += len(requests)
        stats = engines[1].stats()
        held, made = held + stats.accepted_tokens, made + stats.draft_tokens
    times = f"cpu {median(cpu):5.2f}  wall {median(wall):5.2f}"
    return f"{times}  drafts held {held} of {made}, same {same} of {asked}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--running", type=int, default=1)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--same", type=int, default=0)
    options = parser.parse_args()
    config = RunnerConfig(
        sequence_tokens=1024,
        running_limit=max(options.running, 16),
        kv_mib=512,
        dtype="float32",
        quantize=options.quantize,
        threads=options.threads,
        draft_tokens=DRAFT_TOKENS,
    )
    runner = native_runner(config, DirectorySource(options.checkpoint))
    text = real_text(options.checkpoint)
    if options.same:
        requests = [short(text, number, options.new) for number in range(options.same)]
        print(compare(runner, [requests[at : at + 16] for at in range(0, len(requests), 16)]))
        return
    for name, make in (("repeating", repeating), ("wandering", wandering)):
        for running in sorted({1, options.running}):
            groups = [
                [make(text, turn * running + n, options.new) for n in range(running)]
                for turn in range(options.pairs)
            ]
            print(f"{name:10} {running:3} running  {compare(runner, groups)}", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
