"""Layers as models have them, and some that only look so, for what may be fused and what may not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 24


class Attention(nn.Module):
    """Projections as models have them; what is done with the results is of no matter."""

    def __init__(
        self, rows: tuple[int, int, int] = (24, 8, 8), biases: tuple[bool, bool, bool] = (False,) * 3
    ):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, rows[0], bias=biases[0])
        self.k_proj = nn.Linear(WIDTH, rows[1], bias=biases[1])
        self.v_proj = nn.Linear(WIDTH, rows[2], bias=biases[2])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat((self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)), -1)


class CopyingAttention(Attention):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat((self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden.clone())), -1)


class BackwardsAttention(Attention):
    def forward(self, hidden: Tensor) -> Tensor:
        value, key = self.v_proj(hidden), self.k_proj(hidden)
        return torch.cat((self.q_proj(hidden), key, value), -1)


class MLP(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 40, bias=bias)
        self.up_proj = nn.Linear(WIDTH, 40)
        self.down_proj: nn.Module = nn.Linear(40, WIDTH)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class Scaled(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 0.5


class Swapped(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(hidden) * self.act_fn(self.up_proj(hidden)))


class Residual(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden


class NormalizedBetween(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(inner / inner.norm())


class DownTwice(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(super().forward(hidden))


class Downless(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)


class TwoArguments(MLP):
    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden) * scale


class SumOverRanks(nn.Module):
    """A row slice whose call would reach for other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 40))
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden @ self.weight.T


class OtherLinear(nn.Linear):
    pass


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(make()).eval().requires_grad_(False)


def hidden_states(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(9))
