"""Tiny models on a device: the CPU in plain torch, or with an accelerator's kernels interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from container.engine.request import SamplingParams
from container.model.device import Device
from container.model.device_cpu import CpuDevice
from container.model.device_decoder import DecoderWeights
from container.model.device_model import DeviceModel
from container.model.device_runner import DeviceRunner
from container.model.device_step import StepSize
from container.model.device_triton import TritonOperators
from container.model.device_weights import Pack, dense, take
from container.model.kv_limits import LayerShape
from container.model.sampler import Sampler, score
from container.model.shape import Sizes
from tests.model.tiny import VOCABULARY, reference_model

SIZES = Sizes(sequence_tokens=96, slots=4, step_tokens=32, blocks=40, block_tokens=4, resident_tokens=None)
KINDS = ("llama", "qwen2", "qwen3", "mistral")
NO_CAPTURES: tuple[StepSize, ...] = ()
SMALL_CAPTURES = (StepSize(16, 4, 4), StepSize(4, 4, 4), StepSize(2, 2, 2))


def layer_shapes(model: Any) -> list[LayerShape]:
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    return [LayerShape(config.num_key_value_heads, dim, dim, window)] * config.num_hidden_layers


@cache
def weights(kind: str, pack: Pack = dense) -> DecoderWeights:
    model = reference_model(kind)
    return take(model, model.config, layer_shapes(model), CpuDevice(), pack, SIZES.sequence_tokens)


def interpreted() -> CpuDevice:
    return CpuDevice(TritonOperators())


def runner(
    kind: str = "llama",
    device: Device | None = None,
    captures: Sequence[StepSize] = NO_CAPTURES,
    pack: Pack = dense,
) -> DeviceRunner:
    """Return a runner of the tiny model `kind` on `device`, the plain CPU unless given."""
    model = DeviceModel(device or CpuDevice(), weights(kind, pack), SIZES.limits(), captures=captures)
    return DeviceRunner(model, Sampler(VOCABULARY), score, SIZES, SIZES.capacity(VOCABULARY))


def prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=made).tolist() for length in lengths]


@cache
def _continued(kind: str, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits: Tensor = reference_model(kind)(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def continued(kind: str, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Return what transformers' own forward continues `prompt` with, greedily, token by token."""
    return _continued(kind, tuple(prompt), new_tokens)


GREEDY = SamplingParams(temperature=0.0)
