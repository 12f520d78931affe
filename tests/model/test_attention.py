"""The hook's arithmetic equals attention written out by hand, in every variant and packing."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from container.model.attention import Run, Span, Step, attending, packed_attention
from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits, LayerShape

WINDOWS = (None, 1, 5, 6, 64)
SOFTCAPS = (None, 1.5)
HEADS = ((4, 4), (6, 2), (7, 1))  # query heads, key heads


class Layer(nn.Module):
    layer_idx = 0


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    """Return (T, Hq, Dv) for q (Hq, T, D) over all of one sequence's k (Hk, T, D), v (Hk, T, Dv)."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(q.shape[1])
    allowed = at[None] <= at[:, None]
    if window is not None:
        allowed &= at[:, None] - at[None] < window
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, q.shape[1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : q.shape[1]]
    return (weights @ v).transpose(0, 1)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_packed_steps_equal_attention_by_hand(heads: int, kv_heads: int, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    rng = random.Random(heads)
    lengths = (13, 1, 9, 22, 9)
    for window, softcap, sunk in itertools.product(WINDOWS, SOFTCAPS, (False, True)):
        sinks = torch.randn(heads, generator=generator) if sunk else None
        scaling = rng.choice((None, 0.3))
        # Windows of 1 to 6 get rings of 6, which turn over; the window of 64 is longer than the sequences.
        limits = KVLimits(5, 64, 2, 1, step_tokens=4)
        kv = KVCache([LayerShape(kv_heads, 8, value_dim, window)], torch.float32, limits)
        q = [torch.randn(heads, n, 8, generator=generator) for n in lengths]
        k = [torch.randn(kv_heads, n, 8, generator=generator) for n in lengths]
        v = [torch.randn(kv_heads, n, value_dim, generator=generator) for n in lengths]
        done = [0] * len(lengths)
        parts: list[list[Tensor]] = [[] for _ in lengths]
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            advance_all(kv, rng, q, k, v, done, parts, (scaling, window, softcap, sinks))
        for i, pieces in enumerate(parts):
            expected = by_hand(q[i], k[i], v[i], window, softcap, sinks, scaling or 8**-0.5)
            torch.testing.assert_close(torch.cat(pieces), expected, atol=2e-6, rtol=2e-5)


def advance_all(
    kv: KVCache,
    rng: random.Random,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    done: list[int],
    parts: list[list[Tensor]],
    variant: tuple[float | None, int | None, float | None, Tensor | None],
) -> None:
    """Advance a random choice of sequences by one packed step: runs of neighbours first, then spans."""
    counts = {
        i: min(q[i].shape[1] - done[i], rng.choice((1, 1, 4)))
        for i in range(len(q))
        if done[i] < q[i].shape[1] and rng.random() < 0.8
    }
    if not counts:
        return
    places = {i: kv.place(i, done[i] + count) for i, count in counts.items()}
    runs: list[Run] = []
    first = 0
    singles = sorted((i for i, count in counts.items() if count == 1), key=lambda i: places[i].row)
    for i in singles:
        last = runs[-1] if runs else None
        if last is not None and last.row + len(last.ends) == places[i].row:
            last.ends.append(done[i] + 1)
        else:
            runs.append(
                Run(places[i].shelf, places[i].row, first, [done[i] + 1], torch.empty(0), torch.empty(0))
            )
        first += 1
    for run in runs:
        run.rows = torch.arange(run.row, run.row + len(run.ends))
        run.positions = torch.tensor(run.ends) - 1
    several = [i for i in counts if counts[i] != 1]
    spans = []
    for i in several:
        spans.append(Span(places[i].shelf, places[i].row, first, counts[i], done[i]))
        first += counts[i]
    order = singles + several
    scaling, window, softcap, sinks = variant

    def packed(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensors[i][:, done[i] : done[i] + counts[i]] for i in order], dim=1)[None]

    with attending(Step(runs, spans)):
        out, weights = packed_attention(
            Layer(), packed(q), packed(k), packed(v), None, scaling, 0.0, window, softcap, sinks
        )
    assert weights is None
    for i, part in zip(order, out[0].split([counts[i] for i in order]), strict=True):
        parts[i].append(part)
        done[i] += counts[i]


def test_the_hook_outside_a_step_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="outside"):
        packed_attention(Layer(), *(torch.zeros(1, 1, 1, 8) for _ in range(3)), None)


def test_steps_do_not_nest() -> None:
    with attending(Step([], [])), pytest.raises(AssertionError, match="progress"), attending(Step([], [])):
        raise RuntimeError("not reached")


def test_a_failed_forward_leaves_no_step_behind() -> None:
    with pytest.raises(ZeroDivisionError), attending(Step([], [])):
        raise ZeroDivisionError
    with attending(Step([], [])):
        pass
