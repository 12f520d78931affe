"""Which operators a device computes with: the kernels where they are there and right, else torch's own.

Owns: the trial of the kernels at load, the line that tells of a fall-back, where compiled kernels are kept.
Must not know: models, plans. Imports no Triton.
Invariant: kernels that are missing, do not compile, fail or compute something else never serve.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from container.model.device import Activation, Angles, Dense, HeadShape, LayerPages, Operators, StepRows
from container.model.device_cpu import PlainOperators
from container.model.device_torch import TorchOperators

CACHE: Final = "TRITON_CACHE_DIR"  # Triton's own variable
# Of values around 1 in bfloat16, after a norm, a rotation and a softmax.
TOLERANCE: Final = 0.05
PAGE_TOKENS: Final = 4
SHAPE: Final = HeadShape(heads=4, kv_heads=2, dim=64, scale=0.125)
ROWS: Final = ((5, 5), (1, 7), (0, 0))  # tokens and length: a prompt, a decode behind 6 positions, padding

_log = logging.getLogger("strongroom.model")


def chosen(kernels: Callable[[], Operators], place: torch.device, dtype: torch.dtype) -> Operators:
    """Return what `kernels` makes if it passes the trial at `place`, else torch's operators; tells which."""
    try:
        operators = kernels()
        if right(operators, place, dtype):
            return operators
        reason = "the kernels compute something else than their reference"
    except ImportError:
        reason = "Triton is missing"
    except Exception as error:  # noqa: BLE001 - a compiler, a driver: whatever it is, torch's own are left
        reason = f"the kernels fail ({type(error).__name__})"
    _log.warning("attention by torch's scaled_dot_product_attention, slower: %s", reason)
    return TorchOperators()


def right(operators: Operators, place: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a layer's operators give what the plain ones give on the host, in a mixed step."""
    found = _trial(operators, place, dtype)
    wanted = _trial(PlainOperators(), torch.device("cpu"), torch.float32)
    pairs = zip(found, wanted, strict=True)
    return all(bool(((mine.cpu().float() - own).abs() <= TOLERANCE).all()) for mine, own in pairs)


@torch.inference_mode()
def _trial(operators: Operators, place: torch.device, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(7)

    def numbers(*sizes: int) -> Tensor:
        drawn = 0.5 * torch.randn(sizes, generator=made)
        return drawn.bfloat16().to(place, dtype)  # the same values in every dtype

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=place)

    heads, kv_heads, dim = SHAPE.heads, SHAPE.kv_heads, SHAPE.dim
    tokens = sum(count for count, _ in ROWS)
    table = torch.tensor([[3, 1], [2, 4], [0, 0]], dtype=torch.int32, device=place)
    positions = [at for count, length in ROWS for at in range(length - count, length)]
    lines = [line for line, (count, _) in enumerate(ROWS) for _ in range(count)]
    places = [
        int(table[line, at // PAGE_TOKENS]) * PAGE_TOKENS + at % PAGE_TOKENS
        for line, at in zip(lines, positions, strict=True)
    ]
    rows = StepRows(
        starts=ints(0, 5, 6, 6),
        lengths=ints(*(length for _, length in ROWS)),
        lines=ints(*range(len(ROWS))),
        table=table,
        positions=ints(*positions),
        places=ints(*places),
        decodes=False,
    )
    pages = LayerPages(*(numbers(5, PAGE_TOKENS, kv_heads, dim) for _ in range(2)))
    turns = torch.outer(torch.arange(8.0), 100.0 ** -(torch.arange(0, dim, 2) / dim)).to(place)
    hidden, norm = numbers(tokens, dim), numbers(dim)
    weight = Dense(numbers((heads + 2 * kv_heads) * dim, dim) / dim**0.5)
    normed = operators.rms_norm(hidden, norm, 1e-5)
    qkv = operators.linear(normed, weight)
    angles = Angles(turns.cos(), turns.sin())
    query = operators.rotate_and_store(qkv, SHAPE, angles, None, 1e-5, rows, pages)
    attended = operators.attend(query, SHAPE, rows, pages)
    gated = operators.gated(attended, Activation.SILU)
    return [normed, query, pages.keys, pages.values, attended, gated]


def keep_compiled(environment: MutableMapping[str, str] = os.environ) -> Path:
    """Let compiled kernels be kept where they can be written, and return where that is.

    A folder that is set already is left as it is: it may be a read-only one that was filled beforehand.
    """
    given = environment.get(CACHE)
    if given:
        return Path(given)
    home = environment.get("HOME")
    folders = [Path(home, ".triton", "cache")] if home else []
    folder = next((each for each in folders if _writable(each)), None)
    folder = folder or Path(tempfile.mkdtemp(prefix="strongroom-kernels-"))
    environment[CACHE] = str(folder)
    return folder


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
