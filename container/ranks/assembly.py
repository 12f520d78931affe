"""From the configuration to an engine that has made a token.

Owns: the order of assembling source, runner and engine, the warm-up, why a start fails in a closed word.
Must not know: sockets, signals, frames beyond the Welcome. Imports torch only while assembling.
Invariant: an engine that leaves here has sampled real tokens through its whole path.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from container.engine.engine import Engine, EngineLimits
from container.engine.grammar import Grammars
from container.engine.request import EngineRequest, RequestKey, SamplingParams
from container.engine.step import Runner
from container.ranks.config import EngineConfig, encode
from container.ranks.heartbeat import LoadPhase, StartFault
from container.ranks.messages import SCHEMA_VERSION, Welcome
from container.ranks.place import ALONE, Place

if TYPE_CHECKING:
    from container.model.facts import ModelFacts
    from container.model.group import Group
    from container.model.opened import Opener
    from container.model.shape import RunnerConfig
    from container.model.source import ModelSource

WARMUP_KEY: Final = RequestKey(connection=0, id=1)  # connection 0 is nobody's
DRAFT_TOKENS: Final = 8  # guessed ahead at most, where all that was guessed before held
WARMUP_STEPS: Final = 64  # a runner that needs more for two tokens is broken

# What container.model reports while it loads.
PHASES: Final = {
    "checking structure": LoadPhase.PROBE,
    "reading configuration": LoadPhase.OPENING,
    "reading weights": LoadPhase.WEIGHTS,
    "building model": LoadPhase.WEIGHTS,
    "comparing with the reference": LoadPhase.PROBE,
}

Report = Callable[[LoadPhase], None]


class StartFailed(Exception):
    """The engine cannot start; the text is for the operator and free of content."""

    def __init__(self, fault: StartFault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Loaded:
    """A runner and what fronts are told about it."""

    runner: Runner
    kind: str  # "native" or "compat"
    reason: str | None  # closed code when compat
    grammars: Grammars | None = None  # what compiles for the runner's sampler
    summary: str = ""  # for the operator: how it runs, which quantization and why; counts, no names


Loader = Callable[[EngineConfig, Report, Place], Loaded]
# Opens a model that does not lie in the open, for as long as it loads; raises StartFailed.
Opening = Callable[[EngineConfig, Report, Place], AbstractContextManager["Opener"]]
Lead = Callable[[Runner], Runner]  # from rank 0's own runner to that of all ranks
Tell = Callable[[str], None]  # one line to the operator


def load(
    config: EngineConfig, report: Report, place: Place = ALONE, opening: Opening | None = None
) -> Loaded:
    """Load this rank's part of the model in `config.model_dir`; raises StartFailed.

    With `opening` nothing but what it opens is read. Imports torch and transformers, unless a decoder was
    made ready.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # no library looks for a hub, whatever the host's environment says
    # The OpenMP runtime reads this once, when torch loads it. Its threads otherwise spin at every barrier for
    # one that does not run. Two threads on two cores, 30 layers of the demo model's GEMMs at 32 rows: 0.42 s
    # against 0.16 s asleep; while another process uses one core, 9.5 s against 0.36 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from container.model import grammar, ready
    from container.model.errors import LoadError
    from container.model.facts import ModelRefused
    from container.model.opened import Unopened
    from container.model.quantize_choose import QuantizeRefused
    from container.model.shape import SizingError
    from container.model.source import SourceError
    from container.model.start import build_runner

    phase = LoadPhase.OPENING

    def progress(phrase: str) -> None:
        nonlocal phase
        phase = PHASES.get(phrase, phase)
        report(phase)

    try:
        with _source(config, report, place, opening) as source:
            settings = runner_config(config)
            # Its tokenizer is built while the weights load; who follows draws nothing.
            ends = ready.eos_token_ids(settings, source)
            grammars = grammar.over(source, ends) if place.rank == 0 else None
            group = None if place.size == 1 else _group(config, place)
            runner, facts = build_runner(settings, source, progress, group, grammars=grammars)
    except Unopened as error:
        raise StartFailed(StartFault.PACKAGE_REFUSED, str(error).replace("\n", "; ")) from None
    except (SizingError, QuantizeRefused) as error:
        raise StartFailed(StartFault.BAD_CONFIG, str(error)) from None
    except (SourceError, LoadError, ModelRefused) as error:
        raise StartFailed(StartFault.MODEL_REFUSED, str(error)) from None
    reason = None if facts.reason is None else facts.reason.value
    return Loaded(runner, facts.runner, reason, grammars, summary_of(facts))


@contextmanager
def _source(
    config: EngineConfig, report: Report, place: Place, opening: Opening | None
) -> Iterator[ModelSource]:
    """Yield where the model's files and tensors come from, while they are read."""
    from container.model.opened import OpenedSource
    from container.model.source import DirectorySource

    if opening is not None:
        with opening(config, report, place) as opener:
            yield OpenedSource(opener)
        return
    if not Path(config.model_dir, "config.json").is_file():
        raise StartFailed(StartFault.MODEL_NOT_FOUND, "the model directory has no `config.json`")
    yield DirectorySource(config.model_dir)


def unheard(line: str) -> None:
    """Tell nobody."""


def summary_of(facts: ModelFacts) -> str:
    """Return one line about a loaded model: the runner, the arithmetic and why it was chosen."""
    runner = facts.runner if facts.reason is None else f"{facts.runner} ({facts.reason.value})"
    fused = ", ".join(f"{count} {part}" for part, count in sorted(facts.fused.items())) or "nothing"
    quantized = f" ({facts.quantized})" if facts.quantize != "none" else ""
    return (
        f"{runner}, {facts.dtype}; quantization {facts.quantize}: {facts.quantize_reason}{quantized}; "
        f"fused: {fused}; operators: {facts.operators}"
    )


def _group(config: EngineConfig, place: Place) -> Group:
    """Return the group of this place once all ranks are known to have been told the same."""
    group = place.group(config.collectives)
    group.agree(hashlib.sha256(encode(config).encode()).digest())
    return group


def runner_config(config: EngineConfig) -> RunnerConfig:
    """Return what each rank on this machine is told; the model divides what is meant for all of them."""
    from container.model.shape import RunnerConfig
    from container.model.source import PARTS

    return RunnerConfig(
        sequence_tokens=config.sequence_tokens,
        running_limit=config.running_limit,
        step_tokens=config.step_tokens,
        kv_mib=config.kv_mib,  # of all ranks; the model divides it as it divides the heads
        block_tokens=config.block_tokens,
        prefix_cache=config.prefix_cache,
        draft_tokens=0 if config.speculate == "off" else DRAFT_TOKENS,
        compat=config.compat,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        quantize=config.quantize,
        surgery=config.surgery,
        parts_dir=str(Path(config.model_dir, PARTS)),
        threads=config.threads,  # of all ranks, too
    )


def assemble(
    config: EngineConfig,
    report: Report,
    loader: Loader = load,
    place: Place = ALONE,
    lead: Lead | None = None,
    tell: Tell = unheard,
) -> tuple[Engine, Welcome]:
    """Return a warm engine and its Welcome; raises StartFailed, MemoryError, or what a library raises.

    `place` is rank 0's; `lead` returns once the other ranks are loaded too. The warm-up runs on all of them.
    `tell` is given a line about the model.
    """
    report(LoadPhase.OPENING)
    loaded = loader(config, report, place)
    runner = loaded.runner if lead is None else lead(loaded.runner)
    if loaded.summary:
        tell(f"engine loaded: {loaded.summary}")
    try:
        # the runner's slots are the running limit already, fitted to memory
        limits = EngineLimits(waiting=config.waiting_limit, waiting_s=config.waiting_s)
        engine = Engine(runner, limits, grammars=loaded.grammars)
    except ValueError as error:
        raise StartFailed(StartFault.BAD_CONFIG, str(error)) from None
    report(LoadPhase.WARMUP)
    warm_up(engine)
    capacity = engine.capacity
    welcome = Welcome(
        schema=SCHEMA_VERSION,
        sequence_tokens=capacity.sequence_tokens,
        vocabulary=capacity.vocabulary,
        running_limit=engine.running_limit,
        runner=loaded.kind,
        reason=loaded.reason,
        prompt_logprobs=capacity.prompt_logprobs,
        grammar=capacity.grammar,
    )
    return engine, welcome


def warm_up(engine: Engine) -> None:
    """Have `engine` make a token by prefill and, where the window allows, one by decode, and forget it.

    Raises StartFailed(WARMUP_FAILED) when it does not.
    """
    wanted = min(2, engine.capacity.sequence_tokens - 1)
    greedy = SamplingParams(temperature=0.0)
    engine.submit(EngineRequest(key=WARMUP_KEY, prompt=array("i", [0]), max_tokens=wanted, sampling=greedy))
    made = 0
    for _ in range(WARMUP_STEPS):
        for delta in engine.step():
            if delta.error is not None:
                raise StartFailed(StartFault.WARMUP_FAILED, f"the first token failed: {delta.error.value}")
            made += len(delta.tokens)
        if not engine.has_work:
            break
    if made < wanted:
        raise StartFailed(StartFault.WARMUP_FAILED, f"{made} of {wanted} warm-up tokens were made")
    engine.forget_history()  # nobody's request: the counters are about what clients asked for
