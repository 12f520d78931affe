"""Parts of a model cut, fused and quantized beforehand: one file per rank, and a manifest all ranks hold to.

Owns: the manifest, writing and reading parts.
Must not know: which surgery or quantization was done, processes, where a folder lies.
Invariant: a part is used only by the rank, number of ranks, model, libraries and settings it was made for; a
rank maps its own file and nothing else; any mismatch refuses.

    model-rank-0-of-2.safetensors   model-rank-1-of-2.safetensors   manifest.json

A part holds the state dict of the rank's model as its modules name it, quantized buffers included. A head
that is a view of the embedding is not stored. To read a part, an empty model is built, each layer is
given random values for as long as surgery needs to verify itself, taken back to the meta device for
quantization to lay out its buffers, and then gets the stored tensors: no weight is quantized twice. Weights
that are stored in another dtype than a start computes in are converted one by one, as a checkpoint's are.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from container.model.errors import LoadError
from container.model.folders import Folder
from container.model.layout import Layout, lay_out
from container.model.load import (
    BUILDING,
    REFERENCE_ATTENTIONS,
    LoadedModel,
    end_of_sequence,
    load,
    model_class,
    quiet,
    read_config,
)
from container.model.positions import freeze_positions
from container.model.shard import Finish, divide_counts, finish_empty
from container.model.source import ModelSource, config_sha256, file_sha256, source_sha256

MANIFEST: Final = "manifest.json"
FORMAT: Final = 2
MAX_MANIFEST_BYTES: Final = 1024 * 1024  # a line per rank and a few facts
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # that weights are stored in


class ShardMismatch(LoadError):
    """A part was made for something else; the text names what differs, never a tensor."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was done to the layers, in the words of those who did it; compared as they are."""

    quantization: str = "none"  # scheme with its block size
    fused: tuple[str, ...] = ()  # kinds of modules that were joined or replaced before saving


@dataclass(frozen=True, slots=True)
class Manifest:
    """What all parts of a model have in common."""

    format: int
    ranks: int
    source_sha256: str  # see container.model.source
    config_sha256: str
    transformers: str
    architecture: str
    dtype: str  # of DTYPES
    plan_sha256: str  # of what is cut along which dimension
    kv_copies: int
    vocabulary: int
    parameters: int
    quantization: str
    fused: tuple[str, ...]
    files_sha256: tuple[str, ...]  # by rank


def file_name(rank: int, size: int) -> str:
    return f"model-rank-{rank}-of-{size}.safetensors"


def save_shards(
    source: ModelSource,
    directory: Path,
    size: int,
    dtype: torch.dtype,
    recipe: Recipe,
    fuse: Finish,
    quantize: Finish,
    progress: Callable[[str], None],
) -> Manifest:
    """Write the parts of all `size` ranks and the manifest into `directory`; return the manifest.

    One part is in memory at a time. `fuse` and `quantize` do to each layer what `recipe` says. Raises what
    `load` does.
    """

    def finish(layer: nn.Module) -> None:
        fuse(layer)
        quantize(layer)

    digests = []
    loaded: LoadedModel | None = None
    for rank in range(size):
        loaded = None  # the last rank's part goes before the next one comes
        loaded = load(source, dtype, _any_length, progress, rank=rank, size=size, finish=finish)
        path = directory / file_name(rank, size)
        save_file({name: tensor.contiguous() for name, tensor in _own(loaded.model).items()}, path)
        digests.append(file_sha256(path))
    assert loaded is not None, "there is at least one rank"
    manifest = Manifest(
        format=FORMAT,
        ranks=size,
        source_sha256=source_sha256(source) or "",
        config_sha256=config_sha256(source),
        transformers=transformers.__version__,
        architecture=loaded.architecture,
        dtype=str(dtype).removeprefix("torch."),
        plan_sha256=_plan_sha256(loaded.layout),
        kv_copies=loaded.layout.kv_copies,
        vocabulary=loaded.layout.vocabulary,
        parameters=loaded.parameters,
        quantization=recipe.quantization,
        fused=recipe.fused,
        files_sha256=tuple(digests),
    )
    (directory / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """Return the manifest in `folder`; raises ShardMismatch where there is none of this format."""
    try:
        values = json.loads(folder.file(MANIFEST, MAX_MANIFEST_BYTES) or b"")
        values["fused"], values["files_sha256"] = tuple(values["fused"]), tuple(values["files_sha256"])
        manifest = Manifest(**values)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ShardMismatch("the parts have no readable manifest") from None
    if manifest.format != FORMAT or len(manifest.files_sha256) != manifest.ranks:
        raise ShardMismatch("the parts' manifest is of another format")
    return manifest


def load_shard(
    source: ModelSource,
    folder: Folder,
    rank: int,
    size: int,
    dtype: torch.dtype,
    sequence_tokens: Callable[[Any], int],
    recipe: Recipe,
    fuse: Finish,
    quantize: Finish,
    source_digest: str | None = None,
) -> LoadedModel:
    """Return what `rank` of `size` holds, from its file in `folder`; `source` gives the configuration.

    It computes in `dtype`, whatever the weights are stored in. `fuse` sees layers with random values,
    `quantize` layers on the meta device: both only lay out modules. `source_digest`, when known, must be what
    the parts were made from. Raises ShardMismatch, LoadError.
    """
    quiet()
    manifest = read_manifest(folder)
    config = read_config(source)
    cls = model_class(config)
    expected = {
        "ranks": size,
        "config_sha256": config_sha256(source),
        "transformers": transformers.__version__,
        "architecture": cls.__name__,
        "quantization": recipe.quantization,
        "fused": recipe.fused,
    }
    if source_digest is not None:
        expected["source_sha256"] = source_digest
    _compare(manifest, expected)
    if manifest.dtype not in DTYPES:
        raise ShardMismatch("the parts are of no known `dtype`")
    model, reference = _skeleton(config, dtype)
    layout = lay_out(model, rank, size)
    plan = {
        "plan_sha256": _plan_sha256(layout),
        "kv_copies": layout.kv_copies,
        "vocabulary": layout.vocabulary,
    }
    _compare(manifest, plan)
    name = file_name(rank, size)
    if not folder.proves(name, manifest.files_sha256[rank]):
        raise ShardMismatch("a part is missing or not the one its manifest names")
    finish_empty(model, layout, fuse, quantize)
    _fill(model, layout, folder.tensors(name), DTYPES[manifest.dtype], dtype)
    model.eval().requires_grad_(False)
    freeze_positions(model, sequence_tokens(config.get_text_config()))
    divide_counts(model, layout)
    return LoadedModel(
        model=model,
        config=model.config,
        architecture=cls.__name__,
        parameters=manifest.parameters,
        eos_token_ids=end_of_sequence(source, config),
        reference=reference,
        layout=layout,
    )


def _any_length(text: Any) -> int:  # noqa: ARG001 - position encodings are no part of what is saved
    return 2


def _compare(manifest: Manifest, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if getattr(manifest, name) != value:
            raise ShardMismatch(f"the parts were made with another `{name}`")


def _plan_sha256(layout: Layout) -> str:
    cuts = sorted((name, cut.dim, len(cut.ranges)) for name, cut in layout.cuts.items())
    sums = (sorted(layout.rows), sorted(layout.experts), sorted(layout.norms), sorted(layout.first_only))
    return hashlib.sha256(repr((cuts, sums, layout.size)).encode()).hexdigest()


def _own(model: Any) -> dict[str, Tensor]:
    """Return the state dict without a head that is the embedding or a view of it."""
    state: dict[str, Tensor] = model.state_dict()
    embedding = model.get_input_embeddings().weight.untyped_storage().data_ptr()
    for name in model.all_tied_weights_keys:
        if name in state and state[name].untyped_storage().data_ptr() == embedding:
            del state[name]
    return state


def _skeleton(config: Any, dtype: torch.dtype) -> tuple[Any, str]:
    """Return a model whose parameters are on the meta device and whose buffers are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:  # noqa: ARG001
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    here = threading.get_ident()  # torch calls hooks for modules of all threads
    hook: Callable[..., Any] = to_meta
    failure = ""
    with BUILDING:
        for reference in REFERENCE_ATTENTIONS:
            handle = register_module_parameter_registration_hook(hook)
            try:
                return AutoModelForCausalLM.from_config(
                    config, attn_implementation=reference, dtype=dtype
                ), reference
            except Exception as error:  # noqa: BLE001 - transformers raises whatever it met
                failure = type(error).__name__
            finally:
                handle.remove()
    raise LoadError(f"transformers could not build the model ({failure})")


def _fill(
    model: Any, layout: Layout, tensors: dict[str, Tensor], stored: torch.dtype, computed: torch.dtype
) -> None:
    """Make `tensors` those of `model`, where they lie unless they need converting; raises ShardMismatch.

    A weight may be `stored` where the model has it `computed`; a scale in another dtype is another scale.
    """
    expected: dict[str, Tensor] = model.state_dict()
    tied = {name for name in model.all_tied_weights_keys if name in expected and name not in tensors}
    if set(expected) - tied != set(tensors):
        raise ShardMismatch("a part holds other tensors than the model")
    for name, want in expected.items():
        if name in tied:
            continue
        converted = tensors[name].dtype is stored and want.dtype is computed
        if tensors[name].shape != want.shape or not (converted or tensors[name].dtype is want.dtype):
            raise ShardMismatch("a part holds a tensor of another shape or kind than the model's")
        tensors[name] = tensors[name].to(want.dtype)  # itself where it needs none: still mapped
    model.load_state_dict(tensors, strict=False, assign=True)
    if tied:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        rows = embedding.weight.data[slice(*layout.columns)] if layout.size > 1 else embedding.weight
        head.weight = rows if layout.size == 1 else nn.Parameter(rows, requires_grad=False)
