"""Starting from a decoder that was made ready beforehand: nothing is converted, transformers stays out.

Owns: when there is one for a start, what is checked before it is trusted.
Must not know: how it was made (ready_make), processes, requests.
Invariant: a ready decoder serves only where a start without it would have chosen the same scheme, where the
weights beside it are those it was made from, and after it gave the reference's logits on this machine. Where
the operators are missing, or give others, the start goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from container.engine.step import Runner
from container.kernels.block_weight import Kind
from container.kernels.operators import Native, native_operators
from container.model import ready_files, shape
from container.model.facts import Clock, ModelFacts
from container.model.folders import Folder, parts_of
from container.model.fused_model import KV_TYPES, Fused, page_token_bytes, verify
from container.model.kv_limits import LayerShape
from container.model.quantize_choose import (
    AUTO,
    IN_BLOCKS,
    Choice,
    Facts,
    QuantizeRefused,
    Scheme,
    choose,
)
from container.model.ready_files import Manifest, NotReady, Ready
from container.model.replay import LENGTHS, Measured
from container.model.runner import Scorer, SlotSampler, native_runner
from container.model.shape import RunnerConfig
from container.model.source import ModelSource, source_sha256

# Folders under that of parts, by the setting that a start finds them with; `auto` never goes below 8 bits.
FOLDERS: Final = {scheme.value: f"ready-{scheme.value}" for scheme in IN_BLOCKS}
FOLDER: Final = FOLDERS[Scheme.INT8_BLOCK.value]
SCHEMES: Final = (AUTO, *FOLDERS)
KINDS: Final = {Scheme.INT8_BLOCK: Kind.INT8, Scheme.INT4_BLOCK: Kind.INT4}  # of the layers' weights
FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Found:
    """A ready decoder that suits a start."""

    folder: Folder
    manifest: Manifest
    choice: Choice


def eos_token_ids(config: RunnerConfig, source: ModelSource) -> tuple[int, ...] | None:
    """Return the end-of-sequence ids that a ready decoder tells, None without one; raises NotReady."""
    manifest = _manifest(_folder(config, source))
    return None if manifest is None else manifest.eos_token_ids


def find(config: RunnerConfig, source: ModelSource) -> Found | None:
    """Return the ready decoder for a start alone on this machine, or None.

    Raises NotReady where its manifest cannot be read, QuantizeRefused as any start with these settings.
    """
    suits = config.quantize in SCHEMES and config.dtype in ("auto", "float32") and config.surgery != "on"
    folder = _folder(config, source) if suits and native_operators() else None
    manifest = _manifest(folder)
    if folder is None or manifest is None:
        return None
    choice = choose(config.quantize, _facts(manifest))
    return Found(folder, manifest, choice) if choice.scheme in IN_BLOCKS else None


def _folder(config: RunnerConfig, source: ModelSource) -> Folder | None:
    parts = parts_of(config, source)
    return None if parts is None else parts.folder(FOLDERS.get(config.quantize, FOLDER))


def _manifest(folder: Folder | None) -> Manifest | None:
    return None if folder is None else ready_files.read_manifest(folder)


def _facts(manifest: Manifest) -> Facts:
    sizes = manifest.sizes
    return Facts(
        device="cpu",
        capability=None,
        flags=shape.cpu_flags(),
        memory_bytes=shape.memory_limit_bytes(),
        model_bytes=sizes.model_bytes,
        kept_bytes=sizes.kept_bytes,
        head_bytes=sizes.head_bytes,
        head_tied=sizes.head_tied,
        weight_bytes=FLOAT32_BYTES,
        block_kernel=True,
    )


def start(
    found: Found,
    config: RunnerConfig,
    source: ModelSource,
    progress: Callable[[str], None],
    make_sampler: Callable[[int], SlotSampler],
    score: Scorer,
) -> tuple[Runner, ModelFacts] | None:
    """Return the runner of the ready decoder and facts about the model; None: it must not run here.

    Raises NotReady where the files are not what their manifest or the weights beside them say, SizingError,
    SourceError and QuantizeRefused.
    """
    clock = Clock()
    progress("reading weights")
    with clock.phase("load"), ThreadPoolExecutor(1) as beside:
        made_from = beside.submit(source_sha256, source)
        ready = ready_files.read(found.folder, found.manifest)
        _check_source(found.manifest, made_from)
        _check_kinds(ready, found.choice.scheme)
    progress("comparing with the reference")
    with clock.phase("compare"):
        measured = _measured(found.manifest)
        wanted = shape.wanted_tokens(found.manifest.default_tokens, found.manifest.longest_tokens, config)
        kv_type = KV_TYPES[config.kv_dtype]
        page = page_token_bytes(measured.layers, kv_type, config.block_tokens)
        sizes = shape.size(config, wanted, page, paged=True)
        threads = shape.compute_threads(config.threads, shape.physical_cores())
        taken = _verified(ready, found.choice.scheme, measured, max(sizes.sequence_tokens, *LENGTHS), threads)
    if taken is None:
        return None
    packed = taken.model(sizes.limits(), kv_type)
    runner = native_runner(
        packed, make_sampler(measured.vocabulary), score, sizes, measured.vocabulary, config
    )
    return runner, _model_facts(found, clock)


def _check_source(manifest: Manifest, made_from: Future[str | None]) -> None:
    digest = made_from.result()
    if digest is not None and digest != manifest.source_sha256:
        raise NotReady(
            "a ready decoder was made from other weights than those beside it\n"
            "hint: make it again with `strongroom package shard`, or remove it"
        )


def _check_kinds(ready: Ready, scheme: Scheme) -> None:
    kinds = {
        matrix.kind
        for each in ready.weights.layers
        for matrix in (each.qkv, each.output, each.gate_up, each.down)
    }
    if kinds != {KINDS[scheme]}:
        raise NotReady("a ready decoder's weights are not of the scheme that its folder is named after")


def _measured(manifest: Manifest) -> Measured:
    layers = [LayerShape(each.kv_heads, each.dim, each.dim, each.window) for each in manifest.layers]
    return Measured(layers, manifest.vocabulary)


def _verified(ready: Ready, scheme: Scheme, measured: Measured, positions: int, threads: int) -> Fused | None:
    """Return the decoder for so many positions, None where it does not give its references here."""
    manifest = ready.manifest
    # copies: what lies beyond the longest sequence is let go
    cosines, sines = (table[:positions].copy() for table in (ready.weights.cosines, ready.weights.sines))
    weights = replace(ready.weights, cosines=cosines, sines=sines)
    if tuple(map(len, manifest.probe)) != LENGTHS:
        raise NotReady("a ready decoder was made with another probe")
    native = Native(threads)
    taken = verify(native, weights, measured, manifest.probe, ready.references)
    if taken is None:
        native.close()
        return None
    if not taken.finite:
        native.close()
        raise QuantizeRefused(f"activations overflow under `{scheme.value}`\nhint: choose `none`")
    return taken


def _model_facts(found: Found, clock: Clock) -> ModelFacts:
    return ModelFacts(
        runner="native",
        reason=None,
        architecture=found.manifest.architecture,
        parameters=found.manifest.parameters,
        dtype="float32",
        eos_token_ids=found.manifest.eos_token_ids,
        seconds=clock.seconds,
        quantize=found.choice.scheme.value,
        quantize_reason=found.choice.reason,
        operators="fused",
        quantized=f"{found.manifest.quantized}; made ready beforehand",
    )
