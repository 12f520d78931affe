"""From a ModelSource to a transformers model in memory, in eval mode, with nothing left to change under it.

Owns: reading the configuration, building the model, freezing position encodings, switching attention.
Must not know: KV, plans, sampling, where files lie.
Invariant: weights go from the source into the model in memory only; every parameter came from the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from container.model import attention
from container.model.source import ModelSource, SourceError, read_json

REFERENCE_ATTENTIONS: Final = ("sdpa", "eager")  # in order of speed; not every model has the first


class LoadError(Exception):
    """The model cannot be built from its files; the text names the rule, never a tensor."""


@dataclass(slots=True)
class LoadedModel:
    """A model in eval mode, with attention as transformers computes it until `use_hook`."""

    model: Any
    config: Any
    architecture: str
    parameters: int
    eos_token_ids: tuple[int, ...]
    reference: str  # the attention implementation it was built with

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
        config_class = type(AutoConfig.for_model(kind))
        return config_class.from_dict(values)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever its validation met
        raise LoadError(f"`config.json` is not one transformers knows ({type(error).__name__})") from None


def model_class(config: Any) -> Any:
    """Return the causal language model class for `config`; raises LoadError."""
    try:
        with torch.device("meta"):
            return type(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # noqa: BLE001 - as above
        raise LoadError(f"no causal language model for this configuration ({type(error).__name__})") from None


def load(
    source: ModelSource,
    dtype: torch.dtype,
    sequence_tokens: Callable[[Any], int],
    progress: Callable[[str], None],
) -> LoadedModel:
    """Return the model held by `source`, computing in `dtype`.

    `sequence_tokens` maps the text configuration to the longest sequence to be served, from which position
    encodings are frozen. Raises LoadError and SourceError.
    """
    quiet()
    progress("reading configuration")
    config = read_config(source)
    cls = model_class(config)
    progress("reading weights")
    tensors = dict(source.tensors())
    progress("building model")
    model, reference = _build(cls, config, tensors, dtype)
    del tensors
    model.eval().requires_grad_(False)
    freeze_positions(model, sequence_tokens(config.get_text_config()))
    return LoadedModel(
        model=model,
        config=model.config,
        architecture=cls.__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        eos_token_ids=eos_token_ids(source, config),
        reference=reference,
    )


def _build(cls: Any, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Any, str]:
    failure = ""
    for reference in REFERENCE_ATTENTIONS:
        try:
            model, report = cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                attn_implementation=reference,
                dtype=dtype,
                output_loading_info=True,
            )
        except Exception as error:  # noqa: BLE001 - its text may hold tensor names
            failure = type(error).__name__
            continue
        lacking = len(report["missing_keys"]) + len(report["mismatched_keys"])
        if lacking:
            raise LoadError(
                f"{lacking} tensors are missing or have another shape than the configuration says"
            )
        return model, reference
    raise LoadError(f"transformers could not build the model ({failure})")


def freeze_positions(model: Any, sequence_tokens: int) -> None:
    """Fix the frequencies of length-dependent rotary encodings for sequences of `sequence_tokens`.

    transformers picks long or short factors from the largest position in the batch, so that one long request
    would change the keys of all others and spoil cached ones. Chosen once here, as vLLM does.
    """
    last = torch.tensor([[sequence_tokens - 1]])
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and _changes(kind):
            module(torch.zeros(1), last)
            module.rope_type = "default"
        elif isinstance(kind, dict):
            for layer_type, layer_kind in list(kind.items()):
                if _changes(layer_kind):
                    module(torch.zeros(1), last, layer_type)
                    kind[layer_type] = "default"


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def eos_token_ids(source: ModelSource, config: Any) -> tuple[int, ...]:
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
