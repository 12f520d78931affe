"""One rank's part of a model, cut from every parameter at the moment transformers has converted it.

Owns: what happens between a converted parameter and a finished layer: cut, wrap, hand to surgery and
quantization; the head's view of a tied embedding.
Must not know: where tensors come from, the plan's words, collectives beyond the modules that make them.
Invariant: at no time is more held than the parts kept so far, the parameter that just arrived with what it
was converted from, and one layer not yet finished.

    checkpoint -> transformers' conversion -> whole parameter -> Arrival: cut -> module
                                              a layer is complete: wrap -> fuse -> quantize -> next layer

transformers sets a converted parameter with `setattr`, and torch calls a hook there. A checkpoint is read in
the order of layers, so a layer is complete when the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from container.model.layout import KEY_VALUE_COUNTS, QUERY_COUNTS, Layout
from container.model.parallel import RowParallel, SummedExperts, wide_norm

INITIALIZED: Final = "_is_hf_initialized"  # transformers fills whatever does not bear this mark with noise

Finish = Callable[[nn.Module], None]


def untouched(layer: nn.Module) -> None:
    """Leave a decoder layer as it was loaded."""


class Arrival:
    """Receives the parameters of one model as they are set; a context during which it listens."""

    def __init__(self, model: Any, layout: Layout, finish: Finish) -> None:
        """Listen for the parameters of `model`, now on the meta device; `finish` changes a complete layer."""
        self.failure: Exception | None = None  # what `finish` raised
        self._model = model
        self._layout = layout
        self._finish = finish
        self._pending: dict[tuple[int, str], tuple[str, torch.dtype]] = {}
        self._left = dict.fromkeys(layout.layers, 0)
        self._ripe: list[str] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        tied = set(model.all_tied_weights_keys)
        for prefix, module in model.named_modules():
            for leaf, parameter in module.named_parameters(prefix, recurse=False):
                if parameter is not None and leaf not in tied:
                    self._pending[id(module), leaf.rpartition(".")[2]] = (leaf, parameter.dtype)
                    layer = self._layer_of(leaf)
                    if layer is not None:
                        self._left[layer] += 1
        hook: Callable[..., Any] = self._arrived  # torch's annotation has None for what may be a parameter
        self._handle = register_module_parameter_registration_hook(hook)

    def _layer_of(self, name: str) -> str | None:
        return next((layer for layer in self._layout.layers if name.startswith(layer + ".")), None)

    def _arrived(self, module: nn.Module, leaf: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Return the part to keep of `parameter`, or None to keep all of it."""
        if parameter is None or parameter.is_meta:
            return None
        name, dtype = self._pending.pop((id(module), leaf), (None, None))
        if name is None or dtype is None:
            return None
        self._finish_ripe()
        layer = self._layer_of(name)
        if layer is not None:
            self._left[layer] -= 1
            if self._left[layer] == 0:
                self._ripe.append(layer)
        return self._part(name, parameter, dtype)

    def _part(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter | None:
        cut = self._layout.cuts.get(name)
        if cut is not None:
            kept = cut.of(parameter.data)
        elif name in self._layout.first_only and self._layout.rank:
            kept = torch.zeros_like(parameter.data)
        elif parameter.dtype == dtype:
            return None
        else:
            kept = parameter.data
        part = nn.Parameter(kept.to(dtype), requires_grad=False)
        setattr(part, INITIALIZED, True)
        return part

    def _finish_ripe(self) -> None:
        while self._ripe:
            name = self._ripe.pop()
            layer = self._model.get_submodule(name)
            install(self._model, self._layout, name)
            try:
                self._finish(layer)
            except Exception as error:
                self.failure = error
                raise
            self._protect(layer)

    def _protect(self, layer: nn.Module) -> None:
        """Keep transformers' last steps from refilling what `finish` made."""
        for module in layer.modules():
            loose = module._non_persistent_buffers_set
            buffers = [(name, module._buffers.get(name)) for name in loose]
            if all(buffer is not None and not buffer.is_meta for _, buffer in buffers):
                setattr(module, INITIALIZED, True)
            self._buffers.extend((module, name, b) for name, b in buffers if b is not None and not b.is_meta)

    def stop(self) -> None:
        """Stop listening."""
        self._handle.remove()

    def complete(self) -> None:
        """Finish what is left after transformers' own last steps; the model is then whole on this rank."""
        self._finish_ripe()
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        layout = self._layout
        if layout.size > 1:
            install(self._model, layout, "")
            _cut_tied_head(self._model, layout)


def install(model: Any, layout: Layout, prefix: str) -> None:
    """Wrap the modules under `prefix` (a layer, or "" for what is in no layer) that need the other ranks."""

    def concerned(name: str) -> bool:
        if prefix:
            return name.startswith(prefix + ".")
        return not any(name.startswith(layer + ".") for layer in layout.layers)

    for name, cut in layout.cuts.items():
        owner = model.get_submodule(name.rpartition(".")[0]) if concerned(name) else None
        if isinstance(owner, nn.Linear) and name.endswith(".weight"):
            setattr(owner, "in_features" if cut.dim else "out_features", cut.width)
    for name in filter(concerned, layout.rows):
        inner = model.get_submodule(name)
        bias, inner.bias = inner.bias, None
        _replace(model, name, RowParallel(inner, bias))
    for name in filter(concerned, layout.experts):
        _replace(model, name, SummedExperts(model.get_submodule(name)))
    for name, shared in layout.norms.items():
        if concerned(name):
            _replace(model, name, wide_norm(model.get_submodule(name), shared.width, shared.copies))
    for name, heads in layout.attentions.items():
        if concerned(name):
            attention = model.get_submodule(name)
            counts = dict.fromkeys(QUERY_COUNTS, heads.local) | dict.fromkeys(
                KEY_VALUE_COUNTS, heads.kv_local
            )
            counts["num_key_value_groups"] = heads.local // heads.kv_local
            for attribute, count in counts.items():
                if isinstance(getattr(attention, attribute, None), int):
                    setattr(attention, attribute, count)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _cut_tied_head(model: Any, layout: Layout) -> None:
    """Make a head that shares its weight with the embedding a view of the embedding's rows."""
    head = model.get_submodule(layout.head)
    start, stop = layout.columns
    if head.weight.shape[0] == layout.vocabulary:
        whole = head.weight.data
        shared = whole.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        rows = whole[start:stop]
        head.weight = nn.Parameter(rows if shared else rows.clone(), requires_grad=False)
    if head.bias is not None and head.bias.shape[0] == layout.vocabulary:
        head.bias = nn.Parameter(head.bias.data[start:stop].clone(), requires_grad=False)
    head.out_features = stop - start


def divide_counts(model: Any, layout: Layout) -> None:
    """Tell attention code that reads head counts from the configuration about this rank's.

    To be called after positions are frozen: they are computed from the whole model's counts.
    """
    text = model.config.get_text_config()
    for heads in layout.attentions.values():
        text.num_attention_heads = heads.local
        if isinstance(getattr(text, "num_key_value_heads", None), int):
            text.num_key_value_heads = heads.kv_local
        return


def finish_empty(model: Any, layout: Layout, fuse: Finish, quantize: Finish) -> None:
    """Lay out the modules of this rank's part of `model`, whose parameters are and stay on the meta device.

    Each layer holds random values while it is wrapped and fused, as both are verified by computing; only its
    vectors do where nothing is fused.
    """
    draw = _random_vector if fuse is untouched else _random
    for name, cut in layout.cuts.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        shape = list(module._parameters[leaf].shape)
        shape[cut.dim] = cut.width
        kept = torch.empty(shape, dtype=module._parameters[leaf].dtype, device="meta")
        setattr(module, leaf, nn.Parameter(kept, requires_grad=False))
    for name in layout.layers:
        layer = model.get_submodule(name)
        _exchange(layer, draw)
        install(model, layout, name)
        fuse(layer)
        _exchange(layer, lambda parameter: parameter.to("meta"))
        quantize(layer)
    install(model, layout, "")


def _exchange(layer: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in layer.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter.data), requires_grad=False)
                module._parameters[leaf] = made[id(parameter)]


def _random(parameter: Tensor) -> Tensor:
    return torch.randn(parameter.shape).to(parameter.dtype)


def _random_vector(parameter: Tensor) -> Tensor:
    return _random(parameter) if parameter.dim() == 1 else parameter
