"""Making a decoder ready: a start from the model's own weights whose result is written instead of served.

Owns: which models can be made ready, what is told of them.
Must not know: the files' form, serving.
Invariant: what is written gave the reference's logits, as every start demands, before it was written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from msgspec.structs import replace

from container.kernels.block_weight import ARRANGEMENT
from container.model import fused, ready_files, shape
from container.model.fused_model import Fused
from container.model.load import LoadedModel, read_config
from container.model.positions import reaches_alike
from container.model.preparation import Preparation, facts_of
from container.model.quantize_checkpoint import full_precision
from container.model.quantize_choose import Facts, Scheme
from container.model.ready_files import Attention, Manifest, Sizes
from container.model.replay import LENGTHS, probe_sequences
from container.model.source import ModelSource, source_sha256

MAX_POSITIONS: Final = 1 << 17  # 64 MiB of rotations for heads of 128; a longer reach is cut to this


def make(
    source: ModelSource, scheme: Scheme, folder: Path, progress: Callable[[str], None]
) -> Manifest | None:
    """Write the ready decoder of the model in `source` into `folder`; None: it has another form.

    Raises what a start does: LoadError, SourceError, SizingError, QuantizeRefused.
    """
    whole = full_precision(source, torch.float32)
    facts = facts_of(read_config(whole), torch.float32)
    prepared = Preparation(scheme.value, facts, frozenset())
    loaded = prepared.steps.load(whole, torch.float32, _default_tokens, progress)
    prepared.complete(loaded.model)
    prepared.adopt(loaded.model, torch.get_num_threads())
    if prepared.native is None or not reaches_alike(loaded.text_config):
        return None
    default, longest = _reach(loaded.text_config)
    progress("comparing with the reference")
    taken = fused.fuse(loaded, lambda _: max(longest, *LENGTHS), prepared.native)
    if taken is None or not taken.finite:
        return None
    progress("writing")
    manifest = _describe(loaded, taken, facts, (default, longest), prepared.report.describe())
    manifest = replace(manifest, source_sha256=source_sha256(source) or "")
    written = ready_files.write(folder, manifest, taken.weights, taken.references)
    prepared.native.close()
    return written


def _default_tokens(text: Any) -> int:
    return shape.reach(text)[0]


def _reach(text: Any) -> tuple[int, int]:
    """Return the length served when none is asked for, and the longest that rotations are stored for."""
    default, longest = shape.reach(text)
    most = min(MAX_POSITIONS, default if longest is None else longest)
    return min(default, most), most


def _describe(
    loaded: LoadedModel, taken: Fused, facts: Facts, reach: tuple[int, int], quantized: str
) -> Manifest:
    weights = taken.weights
    shapes = [layer.attention for layer in weights.layers]
    return Manifest(
        format=ready_files.FORMAT,
        arrangement=ARRANGEMENT,
        source_sha256="",
        tensors_sha256="",
        architecture=loaded.architecture,
        parameters=loaded.parameters,
        quantized=quantized,
        eos_token_ids=loaded.eos_token_ids,
        default_tokens=reach[0],
        longest_tokens=reach[1],
        vocabulary=taken.measured.vocabulary,
        hidden=weights.embedding.shape[1],
        intermediate=weights.layers[0].down.inputs,
        layers=tuple(Attention(s.heads, s.kv_heads, s.dim, s.scale, s.window) for s in shapes),
        gate=int(weights.gate),
        epsilon=weights.epsilon,
        rotated=2 * weights.cosines.shape[1],
        positions=weights.cosines.shape[0],
        sizes=Sizes(facts.model_bytes, facts.kept_bytes, facts.head_bytes, facts.head_tied),
        probe=tuple(tuple(tokens) for tokens in probe_sequences(taken.measured.vocabulary)),
    )
