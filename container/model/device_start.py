"""The way of a loaded model onto a device: found, recognised, moved, judged by the probe, sized.

Owns: which device there is, the judgement, the sizes of its runner. Must not know: how a device computes.
Invariant: nothing serves from a device that did not give the reference's logits on the probe's steps; what is
not served from it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from container.engine.step import Capacity
from container.model import device_operators, probe, shape
from container.model.device import Device, Operators
from container.model.device_decoder import DecoderWeights
from container.model.device_format import form
from container.model.device_model import DeviceModel
from container.model.device_runner import DeviceRunner
from container.model.device_step import StepSize
from container.model.device_torch import TorchOperators
from container.model.device_weights import Pack, check, dense, fp8, take
from container.model.fused import NotFused
from container.model.kv_limits import KVLimits
from container.model.load import LoadedModel
from container.model.replay import Measured, ProbeFailed, agree, probe_sequences, replay
from container.model.runner import Scorer, SlotSampler
from container.model.shape import RunnerConfig, Sizes

PROBE_PAGE_TOKENS: Final = 4  # short, so that the probe's sequences cross pages
# Sizes are padded in serving, so the probe's are too.
PROBE_CAPTURES: Final = (StepSize(32, 4, 32), StepSize(2, 2, 2))
RUNNING: Final = 256  # sequences and tokens of a step where nothing is set (engine specification, 6.1)
STEP_TOKENS: Final = 2048
KEPT_FREE: Final = 0.1  # of the device's memory: activations, captured launches


def found() -> Device | None:
    """Return the device to serve from, None where there is none, with the operators that pass their trial."""
    if not torch.accelerator.is_available():
        return None
    place = torch.accelerator.current_accelerator()
    if place != torch.device("cuda"):
        return None
    from container.model.device_cuda import CudaDevice

    device_operators.keep_compiled()
    operators = device_operators.chosen(kernels, place, torch.bfloat16)
    return CudaDevice(operators, captures=not isinstance(operators, TorchOperators))


def kernels() -> Operators:
    """Return the operators of Triton's kernels; raises ImportError where there is no Triton."""
    from container.model.device_triton import TritonOperators

    return TritonOperators()


def fits(model: Any) -> bool:
    """Return whether `model`, whose tensors may be empty, is of the form that a device serves."""
    try:
        check(model)
    except NotFused:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on a device that gave its reference's logits on the probe."""

    device: Device
    weights: DecoderWeights
    measured: Measured

    def sizes(self, config: RunnerConfig, wanted: int) -> Sizes:
        """Return what fits into the device's memory; raises SizingError."""
        return sizes(self.device, config, self.measured, wanted, self.weights.embedding.dtype)

    def runner(self, sized: Sizes, config: RunnerConfig, sampler: SlotSampler, score: Scorer) -> DeviceRunner:
        """Return the runner that promises what `sized` and `config` allow; captures its sizes."""
        model = DeviceModel(self.device, self.weights, sized.limits())
        capacity: Capacity = replace(
            sized.capacity(self.measured.vocabulary), prefix_cache=config.prefix_cache
        )
        return DeviceRunner(model, sampler, score, sized, capacity)


def sizes(device: Device, config: RunnerConfig, measured: Measured, wanted: int, dtype: torch.dtype) -> Sizes:
    """Return what `device` can hold of sequences up to `wanted` tokens; raises SizingError."""
    asked = replace(
        config,
        running_limit=config.running_limit or RUNNING,
        step_tokens=config.step_tokens or STEP_TOKENS,
    )
    free = int(device.free_bytes() * (1 - KEPT_FREE)) if config.kv_mib is None else config.kv_mib * 2**20
    token_bytes = shape.kv_bytes_per_token(measured.layers, dtype)
    return shape.size(asked, wanted, token_bytes, free, paged=True)


def place(
    device: Device, loaded: LoadedModel, freeze: Callable[[Measured], int], pack: Pack = dense
) -> Placed | None:
    """Return `loaded` on `device`, None where it has another form or does not give its own logits there.

    `freeze` is told the model's shapes, freezes its positions and returns how many there are. `pack` is the
    form of its products there; in another than `dense` the model itself is left in that form.
    """
    if not fits(loaded.model):
        return None
    sequences = probe_sequences(loaded.text_config.vocab_size)
    try:
        references = probe.reference_logits(loaded.model, sequences) if pack is dense else []
        probe.hooked(loaded.use_hook)
        measured = probe.measure(loaded.model, loaded.text_config.num_hidden_layers)
    except ProbeFailed:
        return None
    finally:
        loaded.use_reference()
    positions = max(freeze(measured), *map(len, sequences))
    try:
        weights = take(loaded.model, loaded.text_config, measured.layers, device, pack, positions)
    except NotFused:
        return None
    if pack is not dense:
        form(loaded.model, pack)
        references = probe.reference_logits(loaded.model, sequences)
    expected = [logits.numpy(force=True) for logits in references]
    # Two ways to sum an activation round it to different numbers of 8 bits now and then.
    rounds = weights.embedding.dtype is torch.bfloat16 or pack is fp8
    whole = PROBE_CAPTURES[0]
    limits = KVLimits(
        slots=whole.rows,
        sequence_tokens=max(map(len, sequences)),
        block_tokens=PROBE_PAGE_TOKENS,
        blocks=whole.tokens,
        step_tokens=whole.tokens,
    )
    model = DeviceModel(device, weights, limits, captures=PROBE_CAPTURES)
    results = replay(lambda rows: model.logits(rows).numpy(force=True), sequences)
    model.close()
    if not all(agree(mine, own, bfloat16=rounds) for mine, own in zip(results, expected, strict=True)):
        return None
    return Placed(device, weights, measured)
