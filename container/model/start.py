"""The way into this room: settings and a model's source in, a runner and facts out.

Owns: the choice between a decoder made ready and a start from the model's own weights, the sampler.
Must not know: how either is built, processes, HTTP.
Invariant: transformers is imported only where a model is built from its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from container.engine.step import Runner
from container.model import ready, shape
from container.model.facts import ModelFacts
from container.model.grammar import GrammarCache
from container.model.group import Group
from container.model.masks import masks_over
from container.model.sampler import Sampler, score
from container.model.shape import RunnerConfig
from container.model.source import ModelSource

if TYPE_CHECKING:
    from container.model.steps import LayerSteps


def build_runner(
    config: RunnerConfig,
    source: ModelSource,
    progress: Callable[[str], None],
    group: Group | None = None,
    steps: LayerSteps | None = None,
    *,
    grammars: GrammarCache | None = None,
) -> tuple[Runner, ModelFacts]:
    """Return a runner for this rank's part of the model in `source`, and facts about the model.

    With `grammars` (see container.model.grammar.over) sampling can be held to them, where they are available.
    Sets torch's thread count for the process. `progress` receives a short phrase per phase. All ranks of
    `group` must call this together; the runners of ranks other than 0 follow: they take the same plans and
    return results without rows. Raises LoadError (ShardRefused where the model cannot be divided),
    SourceError, SizingError, QuantizeRefused, GroupBroken, and ModelRefused when only compat would do and it
    is off.
    """

    def make_sampler(vocabulary: int) -> Sampler:
        return Sampler(vocabulary, masks_over(grammars, vocabulary, shape.physical_cores()))

    if steps is None and (group is None or group.size == 1) and not shape.accelerated():
        found = ready.find(config, source)
        if found is not None:
            started = ready.start(found, config, source, progress, make_sampler, score)
            if started is not None:
                return started
    from container.model.build import assemble

    return assemble(config, source, progress, make_sampler, score, group, steps)
