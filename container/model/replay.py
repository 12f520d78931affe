"""The sequences and steps that every probe runs, and when two sets of logits agree.

Owns: what is run, what is learnt from it, the reasons of a failure, tolerances.
Must not know: transformers, how a model computes.
Invariant: whoever compares runs the same tokens in the same steps, which mix prefill with decode.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from container.model.kv_limits import LayerShape
from container.model.rows import PackedRow

LENGTHS: Final = (13, 9)  # tokens of the two probe sequences; both longer than the shrunk window
# (sequence, first, last) rows of three packed steps: they mix prefill with decode and swap the order.
STEPS: Final = (((0, 0, 7), (1, 0, 8)), ((1, 8, 9), (0, 7, 12)), ((0, 12, 13),))
LIMIT_FP32: Final = 1e-3  # relative error; the hook itself measures about 5e-7
LIMIT_BF16: Final = 0.03  # rounding alone gave 0.011
CLEAR_MARGIN: Final = 0.1  # logits: where the reference's best two are further apart, the best must agree
# A rounded logit is off by up to an eps of its size, and two of them are compared: below twice that, the
# order of the best two is noise. In bf16 the demo model's logits of 32 come in steps of 0.25.
CLEAR_EPS: Final = 2.0
EPS_BF16: Final = 2.0**-7

Rows = npt.NDArray[np.float32]


class ProbeReason(enum.StrEnum):
    """Why a model does not run natively. Closed: it is exported in metrics."""

    PROBE_DIFF = "probe_diff"  # the logits differ
    HOOK_COUNT = "hook_count"  # not exactly one call per layer and step
    NO_HOOK = "no_hook"  # the model never calls the attention interface
    MASK_SEEN = "mask_seen"  # the model builds a mask of its own, which the hook cannot honour
    BUILD_ERROR = "build_error"  # it raised


class ProbeFailed(Exception):
    """The model must not run natively."""

    def __init__(self, reason: ProbeReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Measured:
    """What a forward through the hook told about the model."""

    layers: list[LayerShape]
    vocabulary: int  # width of a row of logits


def probe_sequences(vocabulary: int) -> list[list[int]]:
    """Return the two seeded probe sequences."""
    draw = np.random.default_rng(11)
    return [draw.integers(0, vocabulary, length).tolist() for length in LENGTHS]


def replay(step: Callable[[list[PackedRow]], Rows], sequences: Sequence[Sequence[int]]) -> list[Rows]:
    """Return the logits (tokens, vocabulary) of each of the `sequences` from the probe's packed steps."""
    results: list[list[Rows]] = [[] for _ in sequences]
    for rows in STEPS:
        logits = step(
            [PackedRow(at, first, sequences[at][first:last], range(last - first)) for at, first, last in rows]
        )
        ends = np.cumsum([last - first for _, first, last in rows])[:-1]
        for (at, _, _), part in zip(rows, np.split(logits, ends), strict=True):
            results[at].append(part)
    return [np.concatenate(parts) for parts in results]


def agree(logits: Rows, reference: Rows, *, bfloat16: bool = False) -> bool:
    """Return whether the error is what a dtype rounds off and clear winners agree; NaN never does.

    The dtype is that of what computed either; float32 unless it was `bfloat16`.
    """
    limit, eps = (LIMIT_BF16, EPS_BF16) if bfloat16 else (LIMIT_FP32, float(np.finfo(np.float32).eps))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite does not agree
        error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
    best = np.partition(reference, -2, axis=-1)[:, -2:]
    rounding = CLEAR_EPS * eps * np.abs(reference).max(-1)
    clear = best[:, 1] - best[:, 0] > np.maximum(rounding, CLEAR_MARGIN)
    same = logits.argmax(-1) == reference.argmax(-1)
    return bool(error <= limit) and bool(same[clear].all())
