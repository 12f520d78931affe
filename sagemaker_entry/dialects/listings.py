"""Bodies of the listing routes: /v1/models, /v1/models/{id} and TGI's /info.

Owns: their shapes. Must not know: HTTP, settings, files. Pure functions of facts.
Invariant: no path and no secret has a field to appear in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagemaker_entry.dialects.presenter import encode
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ModelLimits

OWNER = "strongroom"


@dataclass(frozen=True, slots=True)
class Listed:
    """One name a client may put into `model`."""

    name: str
    created_s: int  # unix seconds
    owner: str = OWNER


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What /info tells beside the model's limits."""

    version: str
    fingerprint: str  # of model and configuration, in place of a revision
    concurrent_requests: int


def models_body(models: Sequence[Listed]) -> bytes:
    """Return the list of served names, the base model first."""
    return encode({"object": "list", "data": [_model(model) for model in models]})


def model_body(name: str, models: Sequence[Listed]) -> bytes:
    """Return one served model; raises ApiError MODEL_NOT_FOUND for any other name."""
    for model in models:
        if model.name == name:
            return encode(_model(model))
    raise ApiError(Code.MODEL_NOT_FOUND, param="model")


def info_body(limits: ModelLimits, facts: ServerFacts) -> bytes:
    """Return TGI's /info; names of ours where TGI would tell a path or an image label."""
    return encode(
        {
            "model_id": limits.model,
            "model_sha": facts.fingerprint,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": facts.concurrent_requests,
            "max_best_of": limits.max_best_of,
            "max_stop_sequences": limits.max_tgi_stop_strings,
            "max_input_tokens": limits.input_tokens,
            "max_total_tokens": limits.sequence_tokens,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": OWNER,
            "version": facts.version,
            "sha": None,
            "docker_label": None,
        }
    )


def _model(model: Listed) -> dict[str, str | int]:
    return {"id": model.name, "object": "model", "created": model.created_s, "owned_by": model.owner}
