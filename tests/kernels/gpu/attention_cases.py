"""Random cases of paged attention: rows in poisoned pages, run, compared, and every byte around them checked.

Used in three ways: a seeded part in the suite, all of them by `TRITON_INTERPRET=1 python -m
tests.kernels.gpu.attention_cases`, and on a device by the bench (`scripts/bench gpu`).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from container.kernels.gpu import attention_reference as reference
from container.kernels.gpu.attention import FP8, Extras, PagedShape, Partials, Rows, Tuning, attend

DIMS = (64, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16, 20)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_QUERIES = 48  # tokens times heads of a row: the interpreter takes milliseconds per program
SENTINEL = 777.0  # what lies around `out`, exact in every dtype
ABSENT = 1 << 30  # a page that is nowhere: reading it ends the process
UNCUT = Tuning()
# Of a value around 1: rounding of the result and, in half precision, of the weights before their product.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """What one case is made of; `rows` are (tokens, length after the step)."""

    shape: PagedShape
    rows: tuple[tuple[int, int], ...]
    page_tokens: int = 16
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    sinks: bool = False
    tuning: Tuning = UNCUT
    seed: int = 0
    peak: float = 1.0  # how large queries are: 30 makes softmax choose one position


@dataclass
class Made:
    """A case as tensors; `out` has room before and behind that nobody may touch."""

    rows: Rows
    query: Tensor
    keys: Tensor
    values: Tensor
    extras: Extras
    whole_out: Tensor
    out: Tensor


def random_case(seed: int, largest_length: int = 70) -> Case:
    """Return case number `seed`: edge cases are drawn as often as ordinary ones."""
    rng = random.Random(seed)
    group, kv_heads = rng.choice(GROUPS), rng.choice((1, 1, 2))
    dim = rng.choice(DIMS)
    page_tokens = rng.choice((1, 8, 16, 16, 32, 64))
    window = rng.choice((None, None, 1, 3, page_tokens - 1 or 1, page_tokens, rng.randint(1, 100)))
    value_dim = rng.choice((dim, dim, dim, 64))
    shape = PagedShape(
        group * kv_heads, kv_heads, dim, value_dim, dim**-0.5, window, rng.choice((None, None, 5.0, 50.0))
    )
    most = max(2, MOST_QUERIES // (group * kv_heads))
    rows = tuple(_row(rng, page_tokens, largest_length, most) for _ in range(rng.randint(1, 4)))
    return Case(
        shape,
        rows if any(count for count, _ in rows) else ((1, 1), *rows),
        page_tokens,
        rng.choice(DTYPES),
        rng.random() < 0.25,
        rng.random() < 0.3,
        Tuning(rng.choice((16, 16, 32)), rng.choice((16, 32, 64)), rng.choice((1, 1, 2, 3, 5, 8))),
        seed,
        rng.choice((1.0, 1.0, 30.0)),
    )


def _row(rng: random.Random, page_tokens: int, largest: int, most: int) -> tuple[int, int]:
    kind = rng.choice(("empty", "first", "decode", "decode", "prefill", "chunk", "border"))
    if kind == "empty":
        return 0, rng.choice((0, rng.randint(1, largest)))
    if kind == "first":
        return 1, 1
    if kind == "decode":
        return 1, rng.randint(1, largest)
    if kind == "border":  # exactly full pages, or one position more or less
        length = max(1, page_tokens * rng.randint(1, max(1, largest // page_tokens)) + rng.choice((-1, 0, 1)))
        return rng.randint(1, min(length, most)), length
    count = rng.randint(1, most)
    return (count, count) if kind == "prefill" else (count, count + rng.randint(0, largest))


def make(case: Case, device: str = "cpu") -> Made:
    """Return the tensors of `case`: every position that no query sees holds NaN."""
    made = torch.Generator().manual_seed(case.seed)
    shape, page = case.shape, case.page_tokens
    lengths = [length for _, length in case.rows]
    needed = [-(-length // page) for length in lengths]
    pages = sum(needed) + 3
    order = (1 + torch.randperm(pages - 1, generator=made)).tolist()  # page 0 belongs to nobody
    slots = torch.randperm(len(case.rows) + 2, generator=made)[: len(case.rows)]
    table = torch.full((len(case.rows) + 2, max(needed, default=0) + 2), ABSENT)
    stored = FP8 if case.fp8 else case.dtype
    keys = torch.full((pages, page, shape.kv_heads, shape.key_dim), float("nan"))
    values = torch.full((pages, page, shape.kv_heads, shape.value_dim), float("nan"))
    for (count, length), slot in zip(case.rows, slots.tolist(), strict=True):
        own = [order.pop() for _ in range(-(-length // page))]
        table[slot, : len(own)] = torch.tensor(own, dtype=torch.long)
        first = 0 if shape.window is None else max(0, length - count - shape.window + 1)
        for at in range(first, length) if count else ():
            for pool in (keys, values):
                pool[own[at // page], at % page] = torch.randn(pool.shape[2:], generator=made)
    starts = torch.tensor([0, *(count for count, _ in case.rows)]).cumsum(0)
    tokens = int(starts[-1])
    query = case.peak * torch.randn(tokens, shape.heads, shape.key_dim, generator=made)
    whole = torch.full((tokens + 4, shape.heads, shape.value_dim), SENTINEL, dtype=case.dtype)
    scales = [(0.5 + torch.rand(shape.kv_heads, generator=made)).to(device) for _ in range(2)]
    sinks = torch.randn(shape.heads, generator=made).to(device)
    whole = whole.to(device)
    ints = [part.to(device, torch.int32) for part in (starts, torch.tensor(lengths), slots, table)]
    return Made(
        Rows(*ints),
        query.to(device, case.dtype),
        keys.to(stored).to(device),
        values.to(stored).to(device),
        Extras(sinks if case.sinks else None, *(scales if case.fp8 else (None, None))),
        whole,
        whole[2 : 2 + tokens],
    )


def run(case: Case, made: Made) -> None:
    """Launch the kernel on `made`, its room for partial sums poisoned."""
    partials = None
    if case.tuning.splits > 1:
        partials = Partials.of(case.shape, made.query.shape[0], case.tuning.splits, made.query.device)
        for part in (partials.gathered, partials.peaks, partials.sums):
            part.fill_(float("nan"))
    attend(
        case.shape,
        made.rows,
        made.query,
        made.keys,
        made.values,
        made.out,
        case.tuning,
        made.extras,
        partials,
    )


def expected(case: Case, made: Made) -> Tensor:
    """Return what the reference computes, (tokens, heads, value_dim) float64, on the host."""
    shape, extras = case.shape, made.extras
    out = torch.empty(made.out.shape, dtype=torch.float64)
    rows = made.rows
    reference.attend(
        made.query.cpu(),
        made.keys.cpu(),
        made.values.cpu(),
        out,
        *(part.cpu() for part in (rows.starts, rows.lengths, rows.slots, rows.table)),
        scale=shape.scale,
        window=shape.window,
        softcap=shape.softcap,
        sinks=None if extras.sinks is None else extras.sinks.cpu(),
        key_scales=None if extras.key_scales is None else extras.key_scales.cpu(),
        value_scales=None if extras.value_scales is None else extras.value_scales.cpu(),
    )
    return out


def error(case: Case, device: str = "cpu") -> float:
    """Run `case`; return its largest error over the tolerance, infinity where something was touched."""
    made = make(case, device)
    before = [pool.view(torch.uint8).clone() for pool in (made.keys, made.values)]
    run(case, made)
    after = [pool.view(torch.uint8) for pool in (made.keys, made.values)]
    around = torch.cat((made.whole_out[:2], made.whole_out[-2:]))
    if not all(map(torch.equal, before, after)) or not bool((around == SENTINEL).all()):
        return float("inf")
    want = expected(case, made)
    limit = TOLERANCE[case.dtype] * want.abs().clamp_min(1.0)
    worst = ((made.out.cpu().double() - want).abs() / limit).nan_to_num(float("inf")).max()
    return float(worst)


def of_few_variants(seed: int, variants: int, largest_length: int = 70) -> Case:
    """Return case number `seed` in one of `variants` forms: compiling one takes seconds."""
    drawn = random_case(seed, largest_length)
    return replace(random_case(seed % variants), rows=drawn.rows, seed=seed, peak=drawn.peak)


def check_all(
    seeds: Sequence[int],
    device: str = "cpu",
    largest_length: int = 70,
    variants: int = 500,
    left_s: float = 1e9,
) -> dict[str, float]:
    """Run the cases `seeds` until time is up; return how many failed and the largest error in tolerances."""
    ends_s, errors = time.monotonic() + left_s, []
    for seed in seeds:
        if time.monotonic() > ends_s:
            break
        errors.append(error(of_few_variants(seed, variants, largest_length), device))
    return {
        "cases": len(errors),
        "failed": sum(e > 1 for e in errors),
        "largest_error": max(errors, default=0.0),
    }


def decode_of(case: Case) -> Case:
    """Return `case` with one token per row, as decoding has it."""
    return replace(case, rows=tuple((1, max(1, length)) for _, length in case.rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = check_all(range(options.first, options.first + options.cases), options.device)
    print(found)
    sys.exit(found["cases"] != options.cases or found["failed"] > 0)
