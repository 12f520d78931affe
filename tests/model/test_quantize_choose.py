"""Every row of the table that chooses a scheme, and the closed lists of names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from container.model.quantize_choose import (
    SETTINGS,
    TGI_NAMES,
    Facts,
    QuantizeRefused,
    Scheme,
    choose,
    from_tgi,
    needed_bytes,
)

GIB = 2**30
H100, H200, B200 = (9, 0), (9, 0), (10, 0)
L4, A10G, A100, T4 = (8, 9), (8, 6), (8, 0), (7, 5)
GPU = Facts("cuda", H100, frozenset(), memory_bytes=80 * GIB, model_bytes=16 * GIB)
CPU = Facts("cpu", None, frozenset({"avx2"}), memory_bytes=16 * GIB, model_bytes=4 * GIB, weight_bytes=4)
BELOW_8_BITS = (Scheme.BNB_NF4, Scheme.INT4_BLOCK)


@pytest.mark.parametrize("capability", [H100, H200, B200])
@pytest.mark.parametrize(("model_gib", "scheme"), [(16, "none"), (56, "none"), (57, "fp8"), (140, "fp8")])
def test_hopper_takes_bf16_while_30_percent_are_left(
    capability: tuple[int, int], model_gib: int, scheme: str
) -> None:
    choice = choose("auto", replace(GPU, capability=capability, model_bytes=model_gib * GIB))
    assert choice.scheme.value == scheme
    assert "30 %" in choice.reason


@pytest.mark.parametrize("model_gib", [1, 16, 30])
def test_ada_takes_fp8_whatever_the_size(model_gib: int) -> None:
    facts = replace(GPU, capability=L4, memory_bytes=24 * GIB, model_bytes=model_gib * GIB)
    assert choose("auto", facts).scheme is Scheme.FP8


@pytest.mark.parametrize("capability", [A10G, A100, T4])
@pytest.mark.parametrize(("model_gib", "scheme"), [(14, "none"), (22, "bnb-int8"), (40, "bnb-int8")])
def test_accelerators_without_fp8_take_bf16_while_it_fits_and_never_4_bits(
    capability: tuple[int, int], model_gib: int, scheme: str
) -> None:
    facts = replace(GPU, capability=capability, memory_bytes=24 * GIB, model_bytes=model_gib * GIB)
    assert choose("auto", facts).scheme.value == scheme


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx512f"}, {"avx2", "avx512f", "avx512_vnni"}])
def test_a_cpu_with_the_kernel_takes_int8_blocks(flags: set[str]) -> None:
    facts = replace(CPU, flags=frozenset(flags), block_kernel=True)
    assert choose("auto", facts).scheme is Scheme.INT8_BLOCK


@pytest.mark.parametrize(
    ("flags", "kernel", "word"),
    [({"avx2"}, False, "kernel"), ({"sse4_2"}, True, "AVX2"), ((), False, "AVX2")],
)
def test_a_cpu_without_it_falls_back_to_full_precision_and_says_so(
    flags: set[str], kernel: bool, word: str
) -> None:
    choice = choose("auto", replace(CPU, flags=frozenset(flags), block_kernel=kernel))
    assert choice.scheme is Scheme.NONE
    assert word in choice.reason


def test_a_cpu_without_the_kernel_takes_int8_blocks_where_full_precision_does_not_fit() -> None:
    choice = choose("auto", replace(CPU, model_bytes=20 * GIB))
    assert choice.scheme is Scheme.INT8_BLOCK
    assert "slow" in choice.reason


@pytest.mark.parametrize("facts", [GPU, replace(GPU, capability=L4), replace(GPU, capability=A100), CPU])
def test_what_does_not_fit_at_8_bits_is_refused_with_sizes_and_a_hint(facts: Facts) -> None:
    with pytest.raises(QuantizeRefused, match=r"(?s)need \d+ MiB at 8 bits.*hint:.*int4-block.*unasked"):
        choose("auto", replace(facts, model_bytes=1000 * GIB))


def test_auto_never_goes_below_8_bits() -> None:
    for capability in (None, T4, A100, A10G, L4, H100, B200):
        for model_gib in (1, 10, 20, 40, 80, 100):
            for kernel in (False, True):
                facts = Facts(
                    device="cpu" if capability is None else "cuda",
                    capability=capability,
                    flags=frozenset({"avx2"}),
                    memory_bytes=48 * GIB,
                    model_bytes=model_gib * GIB,
                    block_kernel=kernel,
                )
                try:
                    assert choose("auto", facts).scheme not in BELOW_8_BITS
                except QuantizeRefused:
                    assert model_gib > 40


@pytest.mark.parametrize("scheme", [s for s in Scheme if s is not Scheme.FP8])
@pytest.mark.parametrize("facts", [GPU, CPU])
def test_what_is_asked_for_by_name_is_obeyed(scheme: Scheme, facts: Facts) -> None:
    choice = choose(scheme.value, facts)
    assert choice.scheme is scheme
    assert choice.reason.startswith("asked for")


@pytest.mark.parametrize("setting", ["bnb-nf4", "bnb-int8"])
def test_bitsandbytes_on_a_cpu_is_called_slow(setting: str) -> None:
    assert "slow" in choose(setting, CPU).reason
    assert "slow" not in choose(setting, GPU).reason


@pytest.mark.parametrize("setting", ["int8-block", "int4-block"])
def test_blocks_without_the_kernel_are_said_to_cost_speed(setting: str) -> None:
    assert "speed" in choose(setting, CPU).reason
    assert "speed" not in choose(setting, replace(CPU, block_kernel=True)).reason


@pytest.mark.parametrize("facts", [CPU, replace(GPU, capability=A100), replace(GPU, capability=T4)])
def test_fp8_is_refused_at_start_on_hardware_without_it(facts: Facts) -> None:
    with pytest.raises(QuantizeRefused, match=r"8\.9"):
        choose("fp8", facts)


@pytest.mark.parametrize("capability", [L4, H100, B200])
def test_fp8_is_obeyed_where_the_hardware_has_it(capability: tuple[int, int]) -> None:
    assert choose("fp8", replace(GPU, capability=capability)).scheme is Scheme.FP8


@pytest.mark.parametrize("setting", ["", "nf4", "INT8-BLOCK", "gptq", "None"])
def test_an_unknown_setting_is_refused_with_the_choices_but_not_repeated(setting: str) -> None:
    with pytest.raises(QuantizeRefused, match="auto, none, bnb-nf4") as caught:
        choose(setting, CPU)
    assert "gptq" not in str(caught.value)


def test_settings_are_auto_and_every_scheme() -> None:
    assert set(SETTINGS) == {"auto", *Scheme}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("bitsandbytes", "bnb-int8"), ("bitsandbytes-nf4", "bnb-nf4"), ("fp8", "fp8")],
)
def test_names_of_tgi_mean_ours(name: str, scheme: str) -> None:
    assert from_tgi(name).value == scheme


@pytest.mark.parametrize("name", [name for name, meant in TGI_NAMES.items() if meant is None])
def test_names_of_tgi_that_are_not_served_are_refused_by_name(name: str) -> None:
    with pytest.raises(QuantizeRefused, match=rf"`{name}` is not supported"):
        from_tgi(name)


def test_a_name_nobody_knows_is_not_repeated() -> None:
    with pytest.raises(QuantizeRefused) as caught:
        from_tgi("sk-secret")
    assert "sk-secret" not in str(caught.value)


def test_what_no_scheme_touches_is_counted_in_full() -> None:
    facts = replace(GPU, model_bytes=10 * GIB, kept_bytes=2 * GIB)
    assert needed_bytes(Scheme.NONE, facts) == 10 * GIB
    assert 6 * GIB < needed_bytes(Scheme.FP8, facts) < 6.2 * GIB
    assert needed_bytes(Scheme.INT4_BLOCK, facts) == 2 * GIB + 4 * GIB * 5 // 8
    headed = replace(facts, head_bytes=GIB)  # in 8.5 bits instead of 16 under both schemes in blocks
    assert needed_bytes(Scheme.INT8_BLOCK, headed) == GIB + (4 * GIB + GIB // 2) * 17 // 16
    assert needed_bytes(Scheme.INT4_BLOCK, headed) == GIB + GIB // 2 * 17 // 16 + 4 * GIB * 5 // 8
    tied = replace(headed, head_tied=True)  # the embedding stays beside them
    assert needed_bytes(Scheme.INT4_BLOCK, tied) == needed_bytes(Scheme.INT4_BLOCK, headed) + GIB


def test_settings_can_be_read_without_torch() -> None:
    code = "import container.model.quantize_choose, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_blocks_are_chosen_on_a_cpu_that_has_an_operator_for_them() -> None:
    ample = Facts("cpu", None, frozenset({"avx2"}), 100 * GIB, 10 * GIB, block_kernel=True)
    assert choose("auto", ample).scheme is Scheme.INT8_BLOCK
    assert choose("auto", replace(ample, block_kernel=False)).scheme is Scheme.NONE
    assert choose("auto", replace(ample, flags=frozenset())).scheme is Scheme.NONE
