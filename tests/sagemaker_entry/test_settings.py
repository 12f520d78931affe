"""The settings table: what is read, what is refused and in which words."""

from __future__ import annotations

import dataclasses

import pytest

from sagemaker_entry import settings
from sagemaker_entry.errors import TABLE
from sagemaker_entry.reference import errors_page, settings_page
from sagemaker_entry.settings import Settings, SettingsError, read, variable


def test_an_empty_environment_gives_the_defaults() -> None:
    chosen, ignored = read({})
    assert chosen == Settings()
    assert ignored == ()
    assert (chosen.model, chosen.port, chosen.workers) == ("/opt/ml/model", 8080, 2)
    assert chosen.body_limit_bytes == 25 * 1024 * 1024


ROOT = "ed25519:" + "0f" * 32
VALUES = {
    "host": "127.0.0.1",
    "served_name": "m-1",
    "key": "fd:7",
    "vendor_roots": ROOT,
    "listen": "unix:/a/b",
}
VALUES["customer_roots"] = f"{ROOT},{ROOT}@1900000000"


def test_every_field_can_be_set_by_its_variable() -> None:
    for field in dataclasses.fields(Settings):
        rules = field.metadata
        if "choices" in rules:
            value = rules["choices"][-1]
        elif "pattern" in rules:
            value = VALUES.get(field.name, "/a/b")
        else:
            value = str(rules["high"])
        company = {variable("listen"): "unix:/a/b"} if rules.get("only_with") == "listen" else {}
        chosen, _ = read({variable(field.name): value} | company)
        assert str(getattr(chosen, field.name)).removesuffix(".0") == value


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("SAGEMAKER_BIND_TO_PORT", "9090", "port", 9090),
        ("HF_MODEL_ID", "/opt/ml/model", "model", "/opt/ml/model"),
        ("MAX_INPUT_TOKENS", "100", "max_input_tokens", 100),
        ("MAX_INPUT_LENGTH", "100", "max_input_tokens", 100),
        ("MAX_TOTAL_TOKENS", "200", "max_sequence_tokens", 200),
        ("MAX_CONCURRENT_REQUESTS", "7", "max_concurrent_requests", 7),
        ("MAX_BEST_OF", "3", "max_best_of", 3),
        ("MAX_STOP_SEQUENCES", "5", "max_stop_sequences", 5),
        ("MAX_TOP_N_TOKENS", "6", "max_top_n_tokens", 6),
        ("PAYLOAD_LIMIT", "2000000", "body_limit_bytes", 2_000_000),
        ("SM_NUM_GPUS", "4", "tensor_parallel", 4),
        ("QUANTIZE", "bitsandbytes", "quantize", "bnb-int8"),
        ("QUANTIZE", "bitsandbytes-nf4", "quantize", "bnb-nf4"),
        ("HF_MODEL_QUANTIZE", "fp8", "quantize", "fp8"),
    ],
)
def test_names_users_already_know_are_read(name: str, value: str, field: str, expected: object) -> None:
    assert getattr(read({name: value})[0], field) == expected


def test_our_own_name_wins_over_an_alias_but_the_platforms_port_wins_over_ours() -> None:
    both = {"MAX_TOTAL_TOKENS": "200", "STRONGROOM_MAX_SEQUENCE_TOKENS": "300"}
    assert read(both)[0].max_sequence_tokens == 300
    ports = {"SAGEMAKER_BIND_TO_PORT": "9090", "STRONGROOM_PORT": "8081"}
    assert read(ports)[0].port == 9090


@pytest.mark.parametrize(
    ("environment", "message", "hint"),
    [
        ({"STRONGROOM_PROT": "1"}, "`STRONGROOM_PROT` is not a setting", "STRONGROOM_PORT"),
        ({"STRONGROOM_ZZZZZZZZ": "1"}, "is not a setting", "reference"),
        ({"STRONGROOM_PORT": "80.5"}, "`STRONGROOM_PORT=80.5`", "whole number from 0 to 65535"),
        ({"STRONGROOM_PORT": "70000"}, "out of range", "65535"),
        ({"STRONGROOM_PORT": "-1"}, "malformed", "whole number"),
        ({"STRONGROOM_WORKERS": "0"}, "out of range", "1 to 16"),
        ({"STRONGROOM_MAX_WAIT_S": "0"}, "out of range", "0.1 to 3600"),
        ({"STRONGROOM_DIALECT": "anthropic"}, "`STRONGROOM_DIALECT=anthropic`", "auto, openai, tgi, cohere"),
        ({"STRONGROOM_DRAIN_S": "26"}, "out of range", "25"),
        ({"STRONGROOM_DRAIN_S": "nan"}, "malformed", "a number"),
        ({"HF_MODEL_ID": "org/name"}, "`HF_MODEL_ID=org/name`", "absolute path"),
        ({"SM_NUM_GPUS": "65"}, "`SM_NUM_GPUS=65` is out of range", "1 to 64"),
        ({"SM_NUM_GPUS": "auto"}, "`SM_NUM_GPUS=auto` is malformed", "a whole number from 1 to 64"),
        ({"STRONGROOM_TENSOR_PARALLEL": "0"}, "out of range", "1 to 64"),
        ({"STRONGROOM_QUANTIZE": "bitsandbytes"}, "is not a choice", "bnb-nf4, bnb-int8"),
        (
            {"QUANTIZE": "awq"},
            "`QUANTIZE=awq` is not supported",
            "bitsandbytes-nf4, fp8, or set `STRONGROOM_Q",
        ),
        ({"HF_MODEL_QUANTIZE": "gptq"}, "`HF_MODEL_QUANTIZE=gptq` is not supported", "one of bitsandbytes"),
        ({"QUANTIZE": "int8-block"}, "`QUANTIZE=int8-block` is not supported", "`STRONGROOM_QUANTIZE`"),
        ({"HF_MODEL_TRUST_REMOTE_CODE": "true"}, "HF_MODEL_TRUST_REMOTE_CODE", "never executed"),
        ({"SAGEMAKER_MULTI_MODEL": "true"}, "SAGEMAKER_MULTI_MODEL", "one model"),
        ({"LORA_ADAPTERS": "a=/opt/a"}, "`LORA_ADAPTERS=a=/opt/a` is not supported", "merge the adapter"),
        ({"OPTION_ENABLE_LORA": "true"}, "`OPTION_ENABLE_LORA=true` is not supported", "merge the adapter"),
        ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, "LORA_UPDATING=1` is not", "merge the adapter"),
        ({"SAGEMAKER_BIND_TO_PORT": "http"}, "`SAGEMAKER_BIND_TO_PORT=http`", "65535"),
        ({"MAX_INPUT_TOKENS": "200", "MAX_TOTAL_TOKENS": "200"}, "leaves no room", "less than"),
    ],
)
def test_a_wrong_value_stops_the_start_and_names_what_to_do(
    environment: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        read(environment)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_names_of_other_servers_are_ignored_and_reported_once() -> None:
    _, ignored = read({"PORT": "80", "SPECULATE": "2", "USAGE_STATS": "", "SAGEMAKER_PROGRAM": "train.py"})
    assert ignored == ("SPECULATE", "PORT")


def test_an_empty_value_means_unset() -> None:
    assert read({"STRONGROOM_PORT": "", "STRONGROOM_MAX_RUNNING": ""})[0] == Settings()


def test_settings_survive_the_way_to_a_child() -> None:
    chosen, _ = read({"STRONGROOM_REQUEST_DEADLINE_S": "3.5", "STRONGROOM_SERVED_NAME": "a/b"})
    assert settings.decode(settings.encode(chosen)) == chosen


@pytest.mark.parametrize(
    ("model", "served", "name"),
    [
        ("/opt/ml/model", None, "model"),
        ("/models/My Model/", None, "My-Model"),
        ("/", None, "model"),
        ("/x", "org/name", "org/name"),
    ],
)
def test_the_served_name_is_set_or_taken_from_the_path(model: str, served: str | None, name: str) -> None:
    assert Settings(model=model, served_name=served).name == name


def test_the_reference_pages_name_every_setting_and_every_error() -> None:
    page = settings_page()
    for field in dataclasses.fields(Settings):
        assert f"`{variable(field.name)}`" in page
    for name in (*settings.IGNORED, *settings.GUARDED, "SAGEMAKER_BIND_TO_PORT", "MAX_TOTAL_TOKENS"):
        assert f"`{name}`" in page
    errors = errors_page()
    assert all(f"`{code.value}`" in errors for code in TABLE)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MAX_INPUT_TOKENS": "100", "MAX_INPUT_LENGTH": "50"}, 100),
        ({"MAX_INPUT_LENGTH": "50", "STRONGROOM_MAX_INPUT_TOKENS": "70"}, 70),
        ({"MAX_INPUT_LENGTH": "50", "MAX_INPUT_TOKENS": ""}, 50),
        ({"MAX_INPUT_LENGTH": "50", "STRONGROOM_MAX_INPUT_TOKENS": ""}, 50),
    ],
)
def test_the_more_specific_name_wins_and_an_empty_one_gives_way(
    environment: dict[str, str], expected: int
) -> None:
    assert read(environment)[0].max_input_tokens == expected


def test_the_reference_page_says_what_another_server_s_values_mean() -> None:
    assert "`bitsandbytes` (bnb-int8), `bitsandbytes-nf4` (bnb-nf4), `fp8` (fp8)" in settings_page()


def test_our_own_quantization_names_win_over_another_server_s() -> None:
    both = {"QUANTIZE": "awq", "STRONGROOM_QUANTIZE": "int4-block"}
    assert read(both)[0].quantize == "int4-block"
    assert read({})[0].quantize == "auto"


def test_a_name_that_loses_is_not_even_read() -> None:
    assert read({"STRONGROOM_PORT": "eighty", "SAGEMAKER_BIND_TO_PORT": "9090"})[0].port == 9090
    assert read({"MAX_BEST_OF": "many", "STRONGROOM_MAX_BEST_OF": "3"})[0].max_best_of == 3


@pytest.mark.parametrize(
    ("environment", "deadline_s"),
    [
        ({}, 58.0),
        ({"SAGEMAKER_BATCH": "true"}, 590.0),
        ({"SAGEMAKER_BATCH": "True"}, 590.0),
        ({"SAGEMAKER_BATCH": "false"}, 58.0),
        ({"SAGEMAKER_BATCH": "true", "STRONGROOM_REQUEST_DEADLINE_S": "30"}, 30.0),
    ],
)
def test_a_batch_job_gives_an_answer_the_time_it_waits_itself(
    environment: dict[str, str], deadline_s: float
) -> None:
    assert read(environment)[0].request_deadline_s == deadline_s


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"STRONGROOM_LISTEN": "unix:/s", "STRONGROOM_PORT": "80"},
            "`STRONGROOM_LISTEN` and `STRONGROOM_PORT` exclude each other",
        ),
        (
            {"STRONGROOM_LISTEN": "unix:/s", "SAGEMAKER_BIND_TO_PORT": "80"},
            "`STRONGROOM_LISTEN` and `SAGEMAKER_BIND_TO_PORT` exclude each other",
        ),
        (
            {"STRONGROOM_LISTEN": "unix:/s", "STRONGROOM_HOST": "::"},
            "`STRONGROOM_LISTEN` and `STRONGROOM_HOST` exclude each other",
        ),
        ({"STRONGROOM_SOCKET_MODE": "0600"}, "`STRONGROOM_SOCKET_MODE` has no effect"),
        ({"STRONGROOM_LISTEN": "/run/s"}, "`STRONGROOM_LISTEN=/run/s` is malformed"),
        ({"STRONGROOM_LISTEN": "unix:run/s"}, "is malformed"),
        ({"STRONGROOM_LISTEN": "unix:/" + "x" * 107}, "is malformed"),
        ({"STRONGROOM_LISTEN": "unix:/a:80"}, "is malformed"),
        ({"STRONGROOM_LISTEN": "unix:/s", "STRONGROOM_SOCKET_MODE": "0777"}, "is not a choice"),
    ],
)
def test_a_place_to_listen_is_one_place_and_well_formed(environment: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(environment)
    assert said in str(caught.value)


def test_the_longest_path_that_the_kernel_takes_is_taken() -> None:
    longest = "unix:/" + "x" * 106
    assert read({"STRONGROOM_LISTEN": longest, "STRONGROOM_SOCKET_MODE": "0600"})[0].listen == longest
