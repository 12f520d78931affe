"""Quantizing a model that has just been loaded: facts of the machine, the choice, the walk, a first forward.

Owns: asking the machine, refusing what would change nothing or overflows.
Must not know: probes' verdicts, KV, runners.
Invariant: a model leaves here quantized as chosen, or the start stops with a reason and a next move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from container.model import probe, shape
from container.model.quantize import Report, quantize
from container.model.quantize_choose import Choice, Facts, QuantizeRefused, Scheme, choose


def apply(model: Any, setting: str, vocabulary: int) -> tuple[Choice, Report]:
    """Quantize `model` in place by `setting` and return what was chosen and done; raises QuantizeRefused."""
    choice = choose(setting, machine_facts(model))
    report = quantize(model, choice.scheme)
    if choice.scheme is Scheme.NONE:
        return choice, report
    if report.nothing_done:
        raise QuantizeRefused(f"`{choice.scheme.value}` fits no layer of this model\nhint: choose `none`")
    logits = probe.reference_logits(model, probe.probe_sequences(vocabulary))
    if not all(rows.isfinite().all() for rows in logits):
        raise QuantizeRefused(f"activations overflow under `{choice.scheme.value}`\nhint: choose `none`")
    return choice, report


def machine_facts(model: nn.Module) -> Facts:
    """Return what the choice depends on: the device `model` lies on, its memory, the model's size."""
    parameters = list(model.parameters())
    kept = {id(p): p.nbytes for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        kept |= {id(p): p.nbytes for p in head.parameters()}
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    return Facts(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        flags=frozenset() if on_gpu else shape.cpu_flags(),
        memory_bytes=torch.cuda.mem_get_info(device)[1] if on_gpu else shape.memory_limit_bytes(),
        model_bytes=sum(p.nbytes for p in parameters),
        kept_bytes=sum(kept.values()),
        weight_bytes=parameters[0].element_size(),
    )
