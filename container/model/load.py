"""From a ModelSource to a transformers model in memory, in eval mode, with nothing left to change under it.

Owns: reading the configuration, building the model, switching attention.
Must not know: KV, plans, sampling, where files lie.
Invariant: weights go from the source into the model in memory only, tensor by tensor, so that no second copy
of the model ever exists; every parameter came from the source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from container.model import attention
from container.model.errors import LoadError as LoadError  # told to callers as ours
from container.model.errors import ShardRefused
from container.model.layout import Layout, lay_out
from container.model.positions import UnknownPositions, check_positions, freeze_positions
from container.model.shard import Arrival, Finish, divide_counts, untouched
from container.model.source import ModelSource, SourceError, StoredTensor, read_json

# transformers and torch change settings of the process while a model is built: default dtype, default device,
# random numbers, hooks. One model at a time, then, when ranks are threads.
BUILDING: Final = threading.RLock()
EXPERTS: Final = ".experts."  # in the name of a weight that is stacked with those of other experts
REFERENCE_ATTENTIONS: Final = ("sdpa", "eager")  # in order of speed; not every model has the first


@dataclass(slots=True)
class LoadedModel:
    """A model in eval mode, with attention as transformers computes it until `use_hook`."""

    model: Any
    config: Any
    architecture: str
    parameters: int
    eos_token_ids: tuple[int, ...]
    reference: str  # the attention implementation it was built with
    layout: Layout

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, for those that also see or hear."""
        return self.config.get_text_config()

    def use_hook(self) -> None:
        """Route attention through ours; raises ValueError where the model has no such interface."""
        attention.register()
        self.model.set_attn_implementation(attention.HOOK)

    def use_reference(self) -> None:
        """Route attention through transformers' own."""
        self.model.set_attn_implementation(self.reference)


def quiet() -> None:
    """Keep transformers from printing bars, advice and tensor names."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def read_config(source: ModelSource) -> Any:
    """Return the transformers configuration in `config.json`; raises LoadError."""
    values = read_json(source, "config.json")
    if values is None:
        raise LoadError("the model has no `config.json`")
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise LoadError("`config.json` has no `model_type`")
    if values.get("quantization_config"):
        raise LoadError("the checkpoint is already quantized\nhint: give full-precision weights")
    try:
        config = type(AutoConfig.for_model(kind)).from_dict(values)
        check_positions(config.get_text_config())
        return config
    except UnknownPositions as unknown:
        raise LoadError(str(unknown)) from None
    except Exception as error:  # noqa: BLE001 - transformers raises whatever its validation met
        raise LoadError(f"`config.json` is not one transformers knows ({type(error).__name__})") from None


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the causal language model for `config` without any values; raises LoadError."""
    try:
        with BUILDING, torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - as above
        raise LoadError(f"no causal language model for this configuration ({type(error).__name__})") from None


def model_class(config: Any) -> Any:
    """Return the causal language model class for `config`; raises LoadError."""
    return type(empty_model(config))


def load(
    source: ModelSource,
    dtype: torch.dtype,
    sequence_tokens: Callable[[Any], int],
    progress: Callable[[str], None],
    *,
    rank: int = 0,
    size: int = 1,
    finish: Finish = untouched,
) -> LoadedModel:
    """Return what `rank` of `size` holds of the model in `source`, computing in `dtype`.

    `sequence_tokens` maps the text configuration to the longest sequence to be served, from which position
    encodings are frozen. `finish` is called with each decoder layer once all its parameters are there and
    cut, before those of the next one are kept; it may exchange the layer's modules. The model's parts do not
    talk to other ranks before `parallel.arm`. Raises LoadError (ShardRefused), SourceError and what `finish`
    raises.
    """
    quiet()
    progress("reading configuration")
    config = read_config(source)
    cls = model_class(config)
    progress("reading weights")
    tensors = {name: _Unread(stored, stacked=EXPERTS in name) for name, stored in source.stored()}
    progress("building model")
    with BUILDING:
        building = _Building(rank, size, finish)
        model, reference = building.build(cls, config, tensors, dtype)
    model.eval().requires_grad_(False)
    freeze_positions(model, sequence_tokens(config.get_text_config()))
    assert building.layout is not None
    divide_counts(model, building.layout)
    return LoadedModel(
        model=model,
        config=model.config,
        architecture=cls.__name__,
        parameters=building.parameters,
        eos_token_ids=end_of_sequence(source, config),
        reference=reference,
        layout=building.layout,
    )


class _Unread:
    """Stands for a tensor in a state dict; transformers indexes it with `...` when it wants the values."""

    def __init__(self, stored: StoredTensor, *, stacked: bool) -> None:
        self._stored = stored
        self._stacked = stacked
        self.shape = stored.shape

    def __getitem__(self, _: Any) -> Tensor | _AsStored:
        values = self._stored.read()
        return _AsStored(values) if self._stacked else values


class _AsStored:
    """Values that keep the dtype they are stored in until their stack arrives: it is converted once, and cut.

    Converted one by one, all of them and their stack would be there together, in the wider dtype.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        """What transformers calls next."""
        return self._values.to(device=device)


class _Building:
    """One call of `from_pretrained`, in which we look at the model before its parameters come."""

    def __init__(self, rank: int, size: int, finish: Finish) -> None:
        self.layout: Layout | None = None
        self.parameters = 0  # of the whole model
        self._rank, self._size, self._finish = rank, size, finish
        self._arrival: Arrival | None = None

    def build(
        self, cls: Any, config: Any, tensors: dict[str, _Unread], dtype: torch.dtype
    ) -> tuple[Any, str]:
        """Return the model and the attention it was built with; raises what `load` does."""
        failure = ""
        for reference in REFERENCE_ATTENTIONS:
            try:
                model, report = self._watched(cls).from_pretrained(
                    None,
                    config=config,
                    state_dict=tensors,
                    attn_implementation=reference,
                    dtype=dtype,
                    output_loading_info=True,
                )
            except (ShardRefused, SourceError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - its text may hold tensor names
                if self._arrival is not None and self._arrival.failure is not None:
                    raise self._arrival.failure from None
                failure = type(error).__name__
                continue
            finally:
                if self._arrival is not None:
                    self._arrival.stop()
            model.__class__ = cls
            lacking = len(report["missing_keys"]) + len(report["mismatched_keys"])
            if lacking:
                raise LoadError(
                    f"{lacking} tensors are missing or have another shape than the configuration says"
                )
            assert self._arrival is not None
            self._arrival.complete()
            return model, reference
        raise LoadError(f"transformers could not build the model ({failure})")

    def _watched(self, cls: Any) -> Any:
        """Return a class that builds the same model as `cls` and shows it to us while it is empty."""

        def build_and_show(model: Any, config: Any, *args: Any, **options: Any) -> None:
            cls.__init__(model, config, *args, **options)
            tied = model.all_tied_weights_keys
            self.parameters = sum(p.numel() for name, p in model.named_parameters() if name not in tied)
            self.layout = lay_out(model, self._rank, self._size)
            self._arrival = Arrival(model, self.layout, self._finish)

        return type(cls.__name__, (cls,), {"__init__": build_and_show, "__module__": cls.__module__})


def end_of_sequence(source: ModelSource, config: Any) -> tuple[int, ...]:
    """Return the end-of-sequence ids; the generation configuration knows more of them than the tokenizer."""
    generation = read_json(source, "generation_config.json") or {}
    value = generation.get("eos_token_id")
    if value is None:
        value = getattr(config.get_text_config(), "eos_token_id", None)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise SourceError("`eos_token_id` is not a token id or a list of them")
    return tuple(dict.fromkeys(ids))
