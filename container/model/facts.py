"""What a start tells about the model it loaded, and what it took.

Owns: the facts, the clock of phases. Must not know: how a model is loaded or run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from container.model.replay import ProbeReason


class ModelRefused(Exception):
    """The model fails the probe and compat is off."""

    def __init__(self, reason: ProbeReason) -> None:
        super().__init__(f"the model cannot run natively ({reason.value})\nhint: allow compat")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is worth telling about a loaded model; no content, no names of tensors."""

    runner: str  # native | compat
    reason: ProbeReason | None  # why not native
    architecture: str
    parameters: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    seconds: dict[str, float] = field(default_factory=dict)  # by phase of loading
    fused: dict[str, int] = field(default_factory=dict)  # modules replaced, by surgery.Part
    quantize: str = "none"  # the scheme, one of quantize_choose.Scheme
    quantize_reason: str = ""  # why this one
    # torch | products (native, of blocks) | fused (whole steps are native) | device (an accelerator's)
    operators: str = "torch"
    quantized: str = ""  # what was quantized and what was left, in counts


class Clock:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 3)
