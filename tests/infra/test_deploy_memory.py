"""What an instance type's accelerators hold: the sum by hand, and each way it can end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from infra.deploy import memory, remote_checks
from infra.deploy.memory import GIB, Need
from infra.report import CommandError
from tests.infra.test_deploy_plan import example, recorded

SHAPE = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def config(tmp_path: Path, **changes: Any) -> Path:
    held = {name: value for name, value in {**SHAPE, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(held), encoding="utf-8")
    return tmp_path / "config.json"


def told(need: Need | None, stored: float | None, **changes: str) -> list[tuple[str, str]]:
    choices = dataclasses.replace(example(**changes), need=need)
    stored_bytes = None if stored is None else int(stored * GIB)
    return [(one.state, one.detail) for one in memory.fits(choices, stored_bytes)]


@pytest.mark.parametrize(
    ("changes", "token_bytes"),
    [
        ({}, 2 * 32 * 8 * 128 * 2),
        ({"num_key_value_heads": None}, 2 * 32 * 32 * 128 * 2),
        ({"head_dim": 64}, 2 * 32 * 8 * 64 * 2),
        ({"text_config": {**SHAPE, "num_hidden_layers": 2}}, 2 * 2 * 8 * 128 * 2),
    ],
)
def test_a_tokens_keys_and_values_follow_from_the_shape(
    tmp_path: Path, changes: dict[str, Any], token_bytes: int
) -> None:
    assert memory.read(config(tmp_path, **changes), 8192, None).kv_token_bytes == token_bytes


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_attention_heads": 0}', '{"text_config": 1}'])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CommandError) as caught:
        memory.read(tmp_path / "config.json", 8192, None)
    assert caught.value.message == "`config.json` is no model configuration" and caught.value.hint


def test_contexts_are_counted_for_each_type_of_the_pools() -> None:
    need = Need(8192, 128 * 1024)  # 1 GiB a context
    found = told(need, 16, InstanceType="ml.g6e.2xlarge", InstanceType2="ml.g6.2xlarge")
    # 48 GiB x 0.9 - 16 = 27.2; 24 GiB x 0.9 - 16 = 5.6
    assert [state for state, _ in found] == ["ok", "ok"]
    assert found[0][1].startswith("ml.g6e.2xlarge: 27 contexts of 8,192 tokens beside 16.0 GiB of model")
    assert found[1][1].startswith("ml.g6.2xlarge: 5 contexts")


def test_ranks_add_their_memory() -> None:
    need = Need(8192, 128 * 1024)
    (one,) = told(need, 16, InstanceType="ml.g6.12xlarge")
    (four,) = told(need, 16, InstanceType="ml.g6.12xlarge", TensorParallel="4")
    assert "5 contexts" in one[1] and "70 contexts" in four[1]


@pytest.mark.parametrize(
    ("stored", "need", "state", "words"),
    [
        (200.0, Need(8192, 1024), "refused", "not even 4-bit weights fit"),
        (60.0, Need(8192, 1024), "warn", "does not fit as it is stored"),
        (43.0, Need(8192, 128 * 1024), "refused", "0 contexts"),
        (16.0, Need(8192), "note", "16.0 GiB of model"),
        (None, Need(8192, 1024), "unchecked", "size is not known"),
        (None, Need(8192, 1024, 16 * GIB), "ok", "beside 16.0 GiB"),
        (16.0, None, "note", "43.2 GiB usable (90 %, assumed)"),
    ],
)
def test_each_way_it_can_end(stored: float | None, need: Need | None, state: str, words: str) -> None:
    (found,) = told(need, stored)
    assert found[0] == state and words in found[1]


def test_the_plan_takes_the_size_from_s3_and_a_package_needs_it_told() -> None:
    answer = {"Contents": [{"Key": "strongroom/v1/model.bin", "Size": 200 * GIB}], "IsTruncated": False}
    aws = recorded(ListObjectsV2=answer)
    found = [one for one in remote_checks.model(example(), aws) if one.check == "memory"]
    assert [one.state for one in found] == ["refused"] and found[0].hint
    package = list(remote_checks.model(example("realtime-package-newvpc"), aws))
    assert [(one.check, one.state) for one in package] == [("memory", "unchecked")]
    aws.close()
