"""What the machine and the model allow: memory, threads, arithmetic, window, and the KV pool that follows.

Owns: facts about the host's CPU and memory, the model's window, the sizing of slots and blocks.
Must not know: transformers classes, tensors' values, requests.
Invariant: what is promised fits the memory it came from; a setting that cannot be met stops the start.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from container.engine.step import Capacity
from container.model.kv_limits import KVLimits, LayerShape
from container.model.positions import reach_tokens

if TYPE_CHECKING:
    import torch

CPU_STEP_TOKENS: Final = 256  # prefill is compute-bound from here on, and decodes wait for one step at most
CPU_RUNNING: Final = 32
KEPT_FREE: Final = 0.1  # of the memory limit: activations, the allocator, other processes of the container
DEFAULT_TOKENS: Final = 2048  # of a model that names no window
SMALLEST_WINDOW: Final = 16  # tokens; a machine that cannot hold this cannot serve
WINDOW_NAMES: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
UNLIMITED: Final = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
MEMORY_LIMIT_FILES: Final = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup v2, cgroup v1
LOGITS_BYTES: Final = 2**30  # prompt logprobs need a row of logits per position; more is not offered
FP32_BYTES: Final = 4
ACCELERATOR: Final = Path("/dev/nvidiactl")
CGROUP: Final = Path("/sys/fs/cgroup")


class SizingError(Exception):
    """A setting cannot be met on this machine or by this model."""


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Settings of one runner; None means: derive it from the model and the machine."""

    sequence_tokens: int | None = None  # longest prompt + output
    running_limit: int | None = None  # sequences running at once
    step_tokens: int | None = None  # token budget of one step
    kv_mib: int | None = None  # memory for keys and values
    block_tokens: int = 16
    prefix_cache: bool = True
    compat: bool = True  # False: refuse models that fail the probe
    dtype: str = "auto"  # auto | float32 | bfloat16
    kv_dtype: str = "auto"  # auto | float32 | bfloat16 | int8: keys and values
    parts_dir: str | None = None  # where parts made beforehand lie, see container.model.parts
    quantize: str = "none"  # auto | none | bnb-nf4 | bnb-int8 | int8-block | int4-block | fp8
    draft_tokens: int = 0  # most tokens guessed ahead in one step of a sequence
    surgery: str = "auto"  # auto (off on a CPU) | on | off: fused forms of a model's own modules
    threads: int | None = None  # torch threads of all ranks; None: physical cores the cgroup allows


@dataclass(frozen=True, slots=True)
class Sizes:
    """The result of sizing: what the runner promises the engine."""

    sequence_tokens: int
    slots: int
    step_tokens: int
    blocks: int
    block_tokens: int
    resident_tokens: int | None
    draft_tokens: int = 0

    def limits(self) -> KVLimits:
        return KVLimits(
            self.slots,
            self.sequence_tokens,
            self.block_tokens,
            self.blocks,
            self.resident_tokens,
            self.step_tokens,
            self.draft_tokens,
        )

    def capacity(self, vocabulary: int) -> Capacity:
        """Return what a runner of these sizes promises, with logits `vocabulary` wide."""
        return Capacity(
            blocks=self.blocks,
            block_tokens=self.block_tokens,
            slots=self.slots,
            step_tokens=self.step_tokens,
            sequence_tokens=self.sequence_tokens,
            vocabulary=vocabulary,
            prompt_logprobs=self.step_tokens * vocabulary * FP32_BYTES <= LOGITS_BYTES,
            resident_tokens=self.resident_tokens,
            draft_tokens=self.draft_tokens,
        )


def window_tokens(text_config: Any) -> int | None:
    """Return the longest sequence the model was made for, or None when it does not say."""
    for name in WINDOW_NAMES:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def reach(text_config: Any) -> tuple[int, int | None]:
    """Return the sequence length served when none is asked for, and the longest, None where nothing says."""
    window = window_tokens(text_config)
    return (DEFAULT_TOKENS, None) if window is None else reach_tokens(text_config, window)


def wanted_tokens(default: int, longest: int | None, config: RunnerConfig) -> int:
    """Return the sequence length asked for, before memory is known; raises SizingError beyond `longest`."""
    if config.sequence_tokens is None:
        return default
    if longest is not None and config.sequence_tokens > longest:
        raise SizingError(f"`sequence_tokens` is {config.sequence_tokens}, the model's window is {longest}")
    if config.sequence_tokens < 2:
        raise SizingError("`sequence_tokens` must be at least 2")
    return config.sequence_tokens


def kv_bytes_per_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    return sum(layer.elements for layer in layers) * dtype.itemsize


def kv_bytes_by_window(layers: list[LayerShape], dtype: torch.dtype) -> dict[int, int]:
    """Return what one token costs in the layers of each window, those without a window left out."""
    costs: dict[int, int] = {}
    for layer in layers:
        if layer.window is not None:
            costs[layer.window] = costs.get(layer.window, 0) + layer.elements * dtype.itemsize
    return costs


@dataclass(frozen=True, slots=True)
class KVCost:
    """What sequences cost at most, in bytes.

    Full layers and the store cost by the token, rings by the slot: `token_bytes` and `slots_bytes` for all
    slots. Rings are never longer than slabs would be, so that while sequences are short or few it is
    `plain_token_bytes` and nothing by the slot; the true bound is the lesser of the two.
    """

    plain_token_bytes: int
    token_bytes: int
    slots_bytes: int

    def affordable_tokens(self, budget: int) -> int:
        """Return how many tokens all sequences may have together."""
        plain = budget // self.plain_token_bytes
        if budget < self.slots_bytes:
            return plain
        # With windows in all layers and nothing stored, a token costs nothing more; 1 is counted.
        return max(plain, (budget - self.slots_bytes) // max(1, self.token_bytes))

    def needed_bytes(self, tokens: int) -> int:
        return min(tokens * self.plain_token_bytes, tokens * self.token_bytes + self.slots_bytes)


def check_kv_dtype(setting: str, dtype: torch.dtype) -> None:
    """Raise SizingError unless slabs, which hold what is computed in, hold keys and values as asked."""
    if setting not in ("auto", str(dtype).removeprefix("torch.")):
        raise SizingError(
            f"`kv_dtype` is `{setting}`, which this model's attention does not read\n"
            "hint: choose `auto`, or `quantize` `int8-block` where it runs on the native operators"
        )


def kv_cost(token_bytes: int, windows: Mapping[int, int], limits: KVLimits, stored: bool) -> KVCost:
    """Return the cost of sequences within `limits`; see `size` for the arguments and the reasons."""
    store = token_bytes if stored else 0
    rings = sum(limits.held_tokens(window) * cost for window, cost in windows.items())
    return KVCost(
        plain_token_bytes=2 * token_bytes + store,
        token_bytes=2 * (token_bytes - sum(windows.values())) + store,
        slots_bytes=limits.slots * rings,
    )


def size(
    config: RunnerConfig,
    wanted: int,
    token_bytes: int,
    kv_bytes: int | None = None,
    windows: Mapping[int, int] = MappingProxyType({}),
    *,
    paged: bool = False,
) -> Sizes:
    """Return what fits into the KV budget; raises SizingError when a lone sequence or a setting does not.

    `token_bytes` is what one token of KV costs in all layers, `windows` the part of it by window (see
    kv_bytes_by_window).

    Pages are paid for once: a block id stands for one page at most, its sequences' or what it was published
    for, so that the blocks are all there is to limit.

    Slabs may be half empty after growth by doubling (2 bytes reserved per byte used); the budget pays for
    them, for rings, which are never longer than what they must hold, and, with a prefix cache, for one store
    copy of each block. Sequences that share a cached prefix each hold a copy of it, so their sum is limited
    apart from the blocks, unless every slot can be full at once.
    """
    budget = kv_bytes if kv_bytes is not None else kv_budget_bytes(config)
    slots = config.running_limit or CPU_RUNNING
    step_tokens = config.step_tokens or max(CPU_STEP_TOKENS, slots)
    limits = KVLimits(
        slots, wanted, config.block_tokens, 0, step_tokens=step_tokens, draft_tokens=config.draft_tokens
    )
    if paged:
        cost = KVCost(token_bytes, token_bytes, 0)
    else:
        cost = kv_cost(token_bytes, windows, limits, config.prefix_cache)
    blocks = cost.affordable_tokens(budget) // config.block_tokens
    affordable = blocks * config.block_tokens
    if config.sequence_tokens is None:
        wanted = min(wanted, affordable)
    if affordable < max(wanted, SMALLEST_WINDOW):
        need = -(-cost.needed_bytes(-(-wanted // config.block_tokens) * config.block_tokens) // 2**20)
        raise SizingError(
            f"memory for keys and values holds {affordable} tokens, one sequence needs {wanted}\n"
            f"hint: set `kv_mib` to at least {need} or lower `sequence_tokens`"
        )
    per_sequence = -(-wanted // config.block_tokens)
    ample = slots * per_sequence * (2 if config.prefix_cache else 1)  # all slots full, and as much published
    blocks = min(blocks, ample)
    every_slot_full = slots * per_sequence <= blocks
    return Sizes(
        sequence_tokens=wanted,
        slots=slots,
        step_tokens=step_tokens,
        blocks=blocks,
        block_tokens=config.block_tokens,
        resident_tokens=None if paged or every_slot_full else blocks * config.block_tokens,
        draft_tokens=config.draft_tokens,
    )


def kv_budget_bytes(config: RunnerConfig) -> int:
    """Return the memory for KV: as set, or the limit less a tenth and what the process holds already."""
    if config.kv_mib is not None:
        return config.kv_mib * 2**20
    return max(0, int(memory_limit_bytes() * (1 - KEPT_FREE)) - resident_bytes())


def accelerated(node: Path = ACCELERATOR) -> bool:
    """Return whether this machine shows an accelerator, without loading what would use it."""
    return node.exists()


def memory_limit_bytes(cgroup: Path = CGROUP, proc: Path = Path("/proc")) -> int:
    """Return the smaller of the host's memory and the container's limit (cgroup v2 or v1)."""
    limits = [_total_memory(proc)]
    for name in MEMORY_LIMIT_FILES:
        path = cgroup / name
        if path.is_file():
            text = path.read_text(encoding="ascii").strip()
            if text.isdigit() and int(text) < UNLIMITED:
                limits.append(int(text))
    return min(limits)


def _total_memory(proc: Path) -> int:
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise SizingError("`/proc/meminfo` does not tell the memory size")


def resident_bytes(proc: Path = Path("/proc")) -> int:
    """Return the memory this process holds now."""
    pages = int((proc / "self" / "statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def cpu_flags(proc: Path = Path("/proc")) -> frozenset[str]:
    """Return the instruction set flags of the first CPU; empty where the kernel lists none."""
    for line in (proc / "cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def compute_dtype(setting: str, flags: frozenset[str]) -> torch.dtype:
    """Return the dtype to compute in; raises SizingError for an unknown name.

    bf16 GEMMs without AVX512-BF16 or AMX are 3-6 times slower than fp32 (measured on AVX2), so `auto` takes
    bf16 only where the hardware multiplies it.
    """
    import torch  # importing it takes longer than a ready decoder takes to load, which needs none of it

    if setting == "float32":
        return torch.float32
    if setting == "bfloat16":
        return torch.bfloat16
    if setting == "auto":
        return torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32
    raise SizingError(f"`dtype` is `{setting}`; choose auto, float32 or bfloat16")


def physical_cores(cgroup: Path = CGROUP, proc: Path = Path("/proc")) -> int:
    """Return the physical cores this process may use, by affinity and by the cgroup's quota."""
    allowed = os.sched_getaffinity(0)
    cores: set[tuple[str, str]] = set()
    current: dict[str, str] = {}
    for line in [*(proc / "cpuinfo").read_text(encoding="utf-8").splitlines(), ""]:
        name, _, value = line.partition(":")
        if name.strip():
            current[name.strip()] = value.strip()
        elif current:
            number = current.get("processor", "0")
            if int(number) in allowed:
                cores.add((current.get("physical id", "0"), current.get("core id", number)))
            current = {}
    count = len(cores) or len(allowed)
    quota = _quota_cores(cgroup)
    return max(1, min(count, quota) if quota else count)


def _quota_cores(cgroup: Path) -> int | None:
    modern = cgroup / "cpu.max"
    if modern.is_file():
        quota, period = modern.read_text(encoding="ascii").split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    legacy = cgroup / "cpu" / "cpu.cfs_quota_us"
    if legacy.is_file():
        limit = int(legacy.read_text(encoding="ascii"))
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return max(1, limit // period_us) if limit > 0 else None
    return None


def compute_threads(setting: int | None, cores: int) -> int:
    """Return torch's thread count: as set, or all cores, less one for fronts and IO above four."""
    if setting is not None:
        if setting < 1:
            raise SizingError("`threads` must be at least 1")
        return setting
    return cores - 1 if cores > 4 else cores


def nominal_layers(text: Any) -> list[LayerShape]:
    """Return K and V shapes by the configuration, for accounting where nothing can be measured."""
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(kv_heads, int):
        kv_heads = heads
    head_dim = getattr(text, "head_dim", None) or max(1, text.hidden_size // heads)
    return [LayerShape(kv_heads, head_dim, head_dim)] * text.num_hidden_layers
