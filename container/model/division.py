"""What ranks settle together before they serve: is the division right, how much fits, do all agree.

Owns: the probe of a divided copy, the probe of the divided weights, the common memory budget, the digest.
Must not know: processes, sampling, requests.
Invariant: every rank takes the same branch; whatever could differ between ranks is reduced over them first.

No rank ever holds the whole model, so the division is proved in two halves. A shrunk copy with random
weights is small enough for every rank: it is computed whole, with transformers' own attention, and divided
among the real ranks through the real group, packed and hooked; both must agree. That judges the plan, the
cuts and the sums for this architecture, with the model's own ratio of heads to ranks. The real weights are
then computed by the same shards twice: with transformers' attention, each sequence alone, before surgery, and
packed through the hook, after it. That judges the hook, the surgery and the KV slabs at the real sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from container.model import probe, shape
from container.model.errors import ShardRefused
from container.model.group import Group
from container.model.load import BUILDING, LoadedModel, load
from container.model.parallel import arm
from container.model.positions import GIVEN
from container.model.replay import Measured, ProbeFailed, probe_sequences
from container.model.shape import RunnerConfig, Sizes, SizingError
from container.model.shrink import shrink
from container.model.source import StoredTensor

PROBE_WINDOW: Final = 64  # tokens for which the copy's positions are frozen; its sequences are shorter
BUDGET_UNIT: Final = 2**20  # budgets travel in MiB, which a float32 sum holds exactly up to 16 TiB


class _Copy:
    """A model held in memory, as a source."""

    def __init__(self, model: Any) -> None:
        self._config = json.dumps(model.config.to_dict()).encode()
        self._tensors: dict[str, Tensor] = model.state_dict()

    def file(self, name: str) -> bytes | None:
        return self._config if name == "config.json" else None

    def weights_sha256(self) -> None:
        return None

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        for name, tensor in self._tensors.items():
            yield name, StoredTensor(tuple(tensor.shape), tensor.clone)


def refuse(reason: ProbeFailed, size: int) -> ShardRefused:
    """Return the refusal of a model that only runs on compat, which cannot be divided."""
    return ShardRefused(
        f"the model cannot run natively ({reason.reason.value}), so it cannot be divided among {size} ranks\n"
        "hint: set tensor parallelism to 1"
    )


def probe_division(config: Any, group: Group) -> bool:
    """Return True when a shrunk copy, divided among `group`, agrees with the whole copy.

    False: the configuration cannot be shrunk or the copy cannot be built or loaded, and the real model
    decides. Raises ProbeFailed, GroupBroken.
    """
    loaded = None
    sequences: list[list[int]] = []
    references: list[Tensor] = []
    try:
        small = shrink(config, group.size)
        with BUILDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(21)
            whole = AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=torch.float32)
            whole.eval().requires_grad_(False)
            for parameter in whole.parameters():  # norms and biases too, or a wrong cut of them would pass
                parameter.normal_(float(parameter.dim() == 1), probe.WEIGHT_STD)
        sequences = probe_sequences(small.vocab_size)
        references = probe.reference_logits(whole, sequences)
        loaded = load(
            _Copy(whole),
            torch.float32,
            lambda _: PROBE_WINDOW,
            lambda _: None,
            rank=group.rank,
            size=group.size,
        )
    except Exception:  # noqa: BLE001 - a copy that cannot be built says nothing about the model
        loaded = None
    if not group.minimum(int(loaded is not None)):
        return False
    assert loaded is not None
    arm(loaded.model, group)
    probe.hooked(loaded.use_hook)
    probe.compare(loaded.model, sequences, references, loaded.text_config.num_hidden_layers, group)
    return True


def probe_shards(loaded: LoadedModel, group: Group, fuse: Callable[[], None]) -> Measured:
    """Return what was measured once the shards agree with themselves before `fuse` and the hook.

    Raises ProbeFailed, GroupBroken. `measured.vocabulary` is the whole model's.
    """
    arm(loaded.model, group)
    text = loaded.text_config
    sequences = probe_sequences(text.vocab_size)
    references = probe.reference_logits(loaded.model, sequences, group)
    fuse()
    probe.hooked(loaded.use_hook)
    measured = probe.compare(loaded.model, sequences, references, text.num_hidden_layers, group)
    return dataclasses.replace(measured, vocabulary=loaded.layout.vocabulary)


def budget_bytes(config: RunnerConfig, group: Group) -> int:
    """Return one rank's memory for KV, the same on every rank; ranks share one machine's memory.

    `config.kv_mib` is the sum over the ranks, as heads are divided and not copied where they suffice.
    """
    if config.kv_mib is not None:
        own = config.kv_mib // group.size
    else:
        held = torch.tensor([[shape.resident_bytes() / BUDGET_UNIT]])
        free = shape.memory_limit_bytes() * (1 - shape.KEPT_FREE) / BUDGET_UNIT - float(
            group.all_reduce(held)
        )
        own = max(0, int(free) // group.size)
    return group.minimum(own) * BUDGET_UNIT


def check_positions_kept(loaded: LoadedModel, wanted: int, sizes: Sizes) -> None:
    """Raise SizingError where memory allows less than `wanted` and positions were frozen for that.

    They are computed from the whole model's head counts, which a rank no longer has, so they cannot be
    chosen again for a shorter length.
    """
    frozen = any(getattr(module, GIVEN, None) for module in loaded.model.modules())
    if frozen and sizes.sequence_tokens != wanted:
        raise SizingError(
            f"memory holds sequences of {sizes.sequence_tokens} tokens, positions were chosen for {wanted}\n"
            f"hint: set `sequence_tokens` to at most {sizes.sequence_tokens}"
        )


def threads(config: RunnerConfig, size: int) -> int:
    """Return torch's thread count for one of `size` ranks on one machine; raises SizingError."""
    return max(1, shape.compute_threads(config.threads, shape.physical_cores()) // size)


def agree(
    config: RunnerConfig, loaded: LoadedModel, measured: Measured, sizes: Sizes, kernels: str, group: Group
) -> None:
    """Raise GroupBroken unless all ranks have the same settings, plan, sizes, libraries and kernels."""
    layout = loaded.layout
    facts = (
        dataclasses.astuple(config),
        loaded.architecture,
        layout.size,
        sorted((name, cut.dim) for name, cut in layout.cuts.items()),
        layout.rows,
        layout.experts,
        [(name, heads.total, heads.kv_total) for name, heads in layout.attentions.items()],
        [dataclasses.astuple(layer) for layer in measured.layers],
        measured.vocabulary,
        dataclasses.astuple(sizes),
        kernels,
        transformers.__version__,
        torch.__version__,
    )
    group.agree(hashlib.sha256(repr(facts).encode()).digest())
