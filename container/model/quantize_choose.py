"""Which arithmetic the weights get: a closed list of schemes, and the choice by hardware.

Owns: the names of schemes, the names TGI uses for them, the table from facts to a scheme and its reason.
Must not know: torch, tensors, how a scheme computes. Standard library only, so that settings can read it.
Invariant: `choose` is a pure function; it never goes below 8 bits unless that is asked for by name.

    hardware, asked for `auto`             | scheme
    ---------------------------------------+---------------------------------------------------------------
    compute capability 9.0 and later       | none while 30 % of memory is left for KV, else fp8
    compute capability 8.9                 | fp8
    other accelerators                     | none while it fits, else bnb-int8
    CPU with AVX2 or AVX-512 and a kernel  | int8-block
    CPU otherwise                          | none while it fits, else int8-block, slower but served
    does not fit at 8 bits                 | refused, naming the sizes and the 4-bit schemes
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

AUTO: Final = "auto"
HOPPER: Final = (9, 0)
ADA: Final = (8, 9)  # the first with fp8 tensor cores
KV_SHARE_HOPPER: Final = 0.3  # below this, half the weight bytes buy more concurrency than bf16 buys quality
KV_SHARE: Final = 0.1  # the least that is left for keys, values and activations of a model that "fits"
WIDE_CPU_FLAGS: Final = frozenset({"avx2", "avx512f"})


class Scheme(enum.StrEnum):
    """How the weights of linear layers and experts are stored and multiplied."""

    NONE = "none"
    BNB_NF4 = "bnb-nf4"  # bitsandbytes 4-bit normal float, blocks of 64
    BNB_INT8 = "bnb-int8"  # bitsandbytes LLM.int8 with threshold 0
    INT8_BLOCK = "int8-block"  # ours: blocks of 32, activations too
    INT4_BLOCK = "int4-block"  # ours: blocks of 32; the native operators quantize activations to 8 bits
    FP8 = "fp8"  # e4m3, weights per output channel, activations per token


IN_BLOCKS: Final = (Scheme.INT8_BLOCK, Scheme.INT4_BLOCK)  # what the native operators multiply
SETTINGS: Final = (AUTO, *(scheme.value for scheme in Scheme))  # what `STRONGROOM_QUANTIZE` may be

# What TGI's `QUANTIZE` may be, and what it means here; None: refused by name.
TGI_NAMES: Final[dict[str, Scheme | None]] = {
    "bitsandbytes": Scheme.BNB_INT8,
    "bitsandbytes-nf4": Scheme.BNB_NF4,
    "fp8": Scheme.FP8,
    "bitsandbytes-fp4": None,
    "awq": None,
    "compressed-tensors": None,
    "eetq": None,
    "exl2": None,
    "gptq": None,
    "marlin": None,
}
# Bits per weight with its share of the scales. Embeddings stay as they are; heads too, but for the schemes in
# blocks, which hold them in int8 blocks.
BITS: Final = {
    Scheme.BNB_NF4: 4.5,
    Scheme.BNB_INT8: 8.1,
    Scheme.INT8_BLOCK: 8.5,
    Scheme.INT4_BLOCK: 5.0,
    Scheme.FP8: 8.1,
}


class QuantizeRefused(Exception):
    """The scheme asked for cannot be had here; the text names sizes, choices and the next move."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice depends on, for one rank."""

    device: str  # cpu | cuda
    capability: tuple[int, int] | None  # CUDA compute capability, None on a CPU
    flags: frozenset[str]  # CPU instruction sets
    memory_bytes: int  # for weights, keys, values and activations together
    model_bytes: int  # this rank's weights unquantized, in the dtype computed in
    kept_bytes: int = 0  # of these: embeddings, head, norms, routers, which most schemes leave
    head_bytes: int = 0  # of those: the head, which both schemes in blocks hold in int8 blocks
    head_tied: bool = False  # it is the embedding too, which stays beside its blocks
    weight_bytes: int = 2  # of one unquantized weight
    block_kernel: bool = False  # a native kernel multiplies blocks of integers


@dataclass(frozen=True, slots=True)
class Choice:
    """The scheme and why, in words for the operator."""

    scheme: Scheme
    reason: str


def from_tgi(name: str) -> Scheme:
    """Return the scheme TGI's `name` means; raises QuantizeRefused."""
    scheme = TGI_NAMES.get(name)
    if scheme is None:
        known = ", ".join(f"`{alias}`" for alias, meant in TGI_NAMES.items() if meant is not None)
        what = f"`{name}` is not supported" if name in TGI_NAMES else "not a known name"
        raise QuantizeRefused(f"`QUANTIZE`: {what}\nhint: choose {known}, or set `STRONGROOM_QUANTIZE`")
    return scheme


def choose(setting: str, facts: Facts) -> Choice:
    """Return the scheme for `setting` on this machine; raises QuantizeRefused."""
    if setting not in SETTINGS:
        raise QuantizeRefused(f"`quantize` is not a known scheme\nhint: choose {', '.join(SETTINGS)}")
    if setting != AUTO:
        return _asked(Scheme(setting), facts)
    if facts.device != "cuda":
        return _on_cpu(facts)
    assert facts.capability is not None, "an accelerator tells its compute capability"
    if facts.capability >= HOPPER:
        if _fits(Scheme.NONE, facts, KV_SHARE_HOPPER):
            return Choice(Scheme.NONE, "it fits with 30 % of memory left for keys and values")
        return _eight_bits(Scheme.FP8, facts, "unquantized it leaves less than 30 % of memory")
    if facts.capability == ADA:
        return _eight_bits(Scheme.FP8, facts, "fp8 halves the weight traffic and doubles the arithmetic")
    if _fits(Scheme.NONE, facts, KV_SHARE):
        return Choice(Scheme.NONE, "it fits unquantized and this accelerator has no fp8")
    return _eight_bits(Scheme.BNB_INT8, facts, "it does not fit unquantized")


def supports_fp8(facts: Facts) -> bool:
    """Return whether the hardware multiplies fp8: compute capability 8.9, or 9.0 and later."""
    return facts.device == "cuda" and facts.capability is not None and facts.capability >= ADA


def needed_bytes(scheme: Scheme, facts: Facts) -> int:
    """Return the bytes of this rank's weights under `scheme`, scales included."""
    if scheme is Scheme.NONE:
        return facts.model_bytes
    kept, quantized = facts.kept_bytes, (facts.model_bytes - facts.kept_bytes) / facts.weight_bytes
    if scheme in IN_BLOCKS:
        kept -= 0 if facts.head_tied else facts.head_bytes
        kept += int(facts.head_bytes / facts.weight_bytes * BITS[Scheme.INT8_BLOCK] / 8)
    return kept + int(quantized * BITS[scheme] / 8)


def _asked(scheme: Scheme, facts: Facts) -> Choice:
    if scheme is Scheme.FP8 and not supports_fp8(facts):
        raise QuantizeRefused(
            "`quantize` is `fp8`, which needs an accelerator of compute capability 8.9 or later\n"
            "hint: choose `auto`"
        )
    if scheme in (Scheme.BNB_NF4, Scheme.BNB_INT8) and facts.device == "cpu":
        return Choice(
            scheme, "asked for; slow on a CPU, which unpacks it at every step: `int8-block` is ours"
        )
    if scheme in IN_BLOCKS and not facts.block_kernel:
        return Choice(scheme, "asked for; without a native kernel: saves memory, costs speed")
    return Choice(scheme, "asked for")


def _on_cpu(facts: Facts) -> Choice:
    wide = bool(facts.flags & WIDE_CPU_FLAGS)
    if wide and facts.block_kernel:
        return _eight_bits(Scheme.INT8_BLOCK, facts, "native int8 blocks on this CPU")
    lack = "there is no native kernel for int8 blocks" if wide else "this CPU has neither AVX2 nor AVX-512"
    if _fits(Scheme.NONE, facts, KV_SHARE):
        return Choice(Scheme.NONE, f"{lack}, and it fits unquantized")
    return _eight_bits(Scheme.INT8_BLOCK, facts, f"it does not fit unquantized; {lack}, so it is slow")


def _fits(scheme: Scheme, facts: Facts, share: float) -> bool:
    """Return whether `share` of the memory is left beside the weights."""
    return needed_bytes(scheme, facts) <= facts.memory_bytes * (1 - share)


def _eight_bits(scheme: Scheme, facts: Facts, reason: str) -> Choice:
    if _fits(scheme, facts, KV_SHARE):
        return Choice(scheme, reason)
    need, have = needed_bytes(scheme, facts) >> 20, facts.memory_bytes >> 20
    raise QuantizeRefused(
        f"the weights need {need} MiB at 8 bits, there are {have} MiB\n"
        "hint: more ranks, or ask for `int4-block` or `bnb-nf4`: fewer than 8 bits are never chosen unasked"
    )
