"""/v1/models, /v1/models/{id} and /info: exact shapes, no place for a path or a secret."""

from __future__ import annotations

import json

import pytest
from openai.types import Model

from sagemaker_entry.dialects.listings import Listed, ServerFacts, info_body, model_body, models_body
from sagemaker_entry.errors import ApiError, Code
from tests.sagemaker_entry.dialect_samples import LIMITS

MODELS = (Listed("smol", 1_700_000_000), Listed("smol-legal", 1_700_000_001, "customer"))


def test_the_list_has_every_served_name_in_order() -> None:
    body = json.loads(models_body(MODELS))
    assert body == {
        "object": "list",
        "data": [
            {"id": "smol", "object": "model", "created": 1_700_000_000, "owned_by": "strongroom"},
            {"id": "smol-legal", "object": "model", "created": 1_700_000_001, "owned_by": "customer"},
        ],
    }
    for entry in body["data"]:
        Model.model_validate(entry, strict=True)


def test_one_model_is_found_by_its_exact_name() -> None:
    assert json.loads(model_body("smol-legal", MODELS))["id"] == "smol-legal"


@pytest.mark.parametrize("name", ["", "SMOL", "../smol", "smol\x00", "dummy"])
def test_any_other_name_is_not_found(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        model_body(name, MODELS)
    assert (caught.value.code, caught.value.status) == (Code.MODEL_NOT_FOUND, 404)


def test_info_has_exactly_tgis_fields() -> None:
    body = json.loads(info_body(LIMITS, ServerFacts("0.1.0", "fp-1", concurrent_requests=128)))
    assert body == {
        "model_id": "smol",
        "model_sha": "fp-1",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": 2000,
        "max_total_tokens": 2048,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "strongroom",
        "version": "0.1.0",
        "sha": None,
        "docker_label": None,
    }
