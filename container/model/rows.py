"""What a model is asked to compute in one step, sequence by sequence, and what it answers.

Owns: the row, what logits can be asked. Must not know: models, keys and values, plans.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

# (wanted, vocabulary) float32, in host memory or where a device has them; rows are taken by index.
Logits: TypeAlias = "npt.NDArray[np.float32] | Tensor"


@dataclass(slots=True)
class PackedRow:
    """Tokens at positions start, start + 1, ... of the sequence in `slot`.

    `wanted` are offsets into the row whose logits are to be returned.
    """

    slot: int
    start: int
    tokens: Sequence[int] | array[int] = field(repr=False)
    wanted: Sequence[int] = ()
