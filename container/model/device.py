"""What the model asks of a device, all of it: memory, order, captured launches, a layer's operators.

Owns: the two protocols and the weights they know. Must not know: which device answers.
Invariant: nothing else in this room names a device's library; a second device is a second answer to these.

    upload, operators, replay and download take effect in the order they are called; none of them waits.
    Only `Marker.wait` waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadShape:
    """One layer's attention; `window` None: a query sees all earlier positions."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """A step's rows on the device, int32 all.

    Tokens [starts[r], starts[r + 1]) are the last positions of the sequence in line `lines[r]` of `table`
    (lines, pages of a sequence), which holds `lengths[r]` positions with them. `places` (tokens,) are
    page * page_tokens + offset, -1 for padding.
    """

    starts: Tensor
    lengths: Tensor
    lines: Tensor
    table: Tensor
    positions: Tensor
    places: Tensor
    decodes: bool  # no row has more than one token: told, since lengths are not read on the host


@dataclass(frozen=True, slots=True, eq=False)
class LayerPages:
    """One layer's keys and values, (pages, page_tokens, kv_heads, dim) each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """Cosines and sines (positions, rotated / 2) float32."""

    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorm:
    """Norms of each query and key head before their rotation; (dim,) each."""

    query: Tensor
    key: Tensor


class Activation(Enum):
    """What the gate of a feed-forward goes through."""

    SILU = auto()
    GELU_TANH = auto()


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A weight (outputs, inputs) as it is, with its bias."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fp8:
    """A weight (outputs, inputs) in fp8 e4m3 with a float32 scale per output."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Int4:
    """A weight in 4 bits: (outputs, inputs / 2) uint8 and (outputs, groups) float16 scales."""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None = None


Weight = Dense | Fp8 | Int4


class Marker(Protocol):
    """A point in the device's order."""

    def wait(self) -> None:
        """Return when the device is past it."""


class Operators(Protocol):
    """What a decoder layer is made of. Tensors are (tokens, width) on the device, in the model's dtype."""

    def rotate_and_store(
        self,
        qkv: Tensor,
        shape: HeadShape,
        angles: Angles,
        norms: HeadNorm | None,
        epsilon: float,
        rows: StepRows,
        pages: LayerPages,
    ) -> Tensor:
        """Return rotated queries (tokens, heads, dim) of `qkv`, whose keys and values go to their places."""

    def attend(self, query: Tensor, shape: HeadShape, rows: StepRows, pages: LayerPages) -> Tensor:
        """Return (tokens, heads * dim); padding tokens get anything finite or not."""

    def rms_norm(
        self, hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        """Return the norm of `hidden`, or of what `residual` becomes by adding it in place."""

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return activation(first half) * second half, (tokens, width / 2)."""

    def linear(self, hidden: Tensor, weight: Weight) -> Tensor:
        """Return (tokens, outputs)."""


class Device(Protocol):
    """Memory and order of one device."""

    @property
    def operators(self) -> Operators: ...

    @property
    def capability(self) -> tuple[int, int] | None:
        """NVIDIA's compute capability, None on anything else."""

    def free_bytes(self) -> int:
        """Return how much more memory could be taken."""

    def zeros(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of the device."""

    def staging(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return host memory that `upload` and `download` need not wait for."""

    def upload(self, source: Tensor, to: Tensor) -> Marker:
        """Copy host memory to the device; `source` stays as it is until the marker was waited for."""

    def download(self, source: Tensor, to: Tensor) -> Marker:
        """Copy to host memory; it may be read once the marker was waited for."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the launches of `launch`, which works on memory that stays in place."""
