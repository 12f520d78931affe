"""What the supervisor tells the engine process, once, at start.

Owns: the engine's configuration as one frozen struct and its file form.
Must not know: environment variables (sagemaker_entry.settings reads them), torch.
"""

from __future__ import annotations

from typing import Final

import msgspec

CONNECTING: Final = ("gloo", "nccl")  # of the collectives; the others share memory


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that the engine process needs; None means: derive it from the model and the machine."""

    model_dir: str
    sequence_tokens: int | None = None  # longest prompt + output
    running_limit: int | None = None  # sequences running at once
    step_tokens: int | None = None  # token budget of one step
    waiting_limit: int | None = None  # sequences queued before 429; None: 4 x running
    waiting_s: float = 5.0  # estimated wait beyond which new requests get 429
    kv_mib: int | None = None  # memory for keys and values
    block_tokens: int = 16
    prefix_cache: bool = True
    compat: bool = True  # False: refuse models that fail the probe
    dtype: str = "auto"  # auto | float32 | bfloat16
    kv_dtype: str = "auto"  # auto | float32 | bfloat16 | int8: keys and values
    quantize: str = "auto"  # auto | none | bnb-nf4 | bnb-int8 | int8-block | int4-block | fp8
    speculate: str = "auto"  # auto | off: guessing tokens ahead from the sequence's own
    surgery: str = "auto"  # auto | on | off: fused forms of the model's own modules
    tensor_parallel: int = 1  # ranks that hold one model together
    collectives: str = "auto"  # auto | shared | gloo | nccl: how ranks add and gather
    rank_wait_s: float = 120.0  # a rank that keeps the others waiting for this long in a step is lost
    threads: int | None = None  # torch threads; None: physical cores the cgroup allows
    lockdown: bool = False  # have the kernel refuse every way out; the supervisor asks for it

    @property
    def connects(self) -> bool:
        """Whether the ranks open connections to each other when they start."""
        return self.tensor_parallel > 1 and self.collectives in CONNECTING


def encode(config: EngineConfig) -> str:
    """Return `config` as one line of JSON."""
    return msgspec.json.encode(config).decode()


def decode(text: str) -> EngineConfig:
    """Return the config encoded in `text`; raises msgspec.ValidationError on any unknown or bad field."""
    return msgspec.json.decode(text, type=EngineConfig)
