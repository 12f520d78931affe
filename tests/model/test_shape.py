"""Sizing promises what fits, and stops the start when a setting cannot be met."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from container.model import shape
from container.model.kv_limits import LayerShape
from container.model.shape import RunnerConfig, SizingError

KIB = 1024
MIB = 1024 * KIB


def test_a_token_costs_keys_and_values_of_all_layers() -> None:
    assert shape.kv_bytes_per_token([LayerShape(8, 128, 128)] * 32, torch.bfloat16) == 128 * KIB
    assert shape.kv_bytes_per_token([LayerShape(128, 192, 128)], torch.bfloat16) == 80 * KIB


def test_ample_memory_lets_every_slot_be_full() -> None:
    sizes = shape.size(RunnerConfig(), 1000, KIB, 100_000 * MIB)
    assert (sizes.slots, sizes.sequence_tokens, sizes.step_tokens) == (32, 1000, 256)
    assert sizes.blocks == 32 * 63 * 2
    assert sizes.resident_tokens is None


def test_scarce_memory_limits_blocks_and_the_sum_of_sequences() -> None:
    sizes = shape.size(RunnerConfig(sequence_tokens=256), 256, KIB, 3 * MIB)
    assert sizes.blocks == 64
    assert sizes.resident_tokens == 1024


def test_pages_are_paid_for_once_and_nothing_else_is_limited() -> None:
    for prefix_cache in (True, False):
        config = RunnerConfig(sequence_tokens=256, prefix_cache=prefix_cache)
        sizes = shape.size(config, 256, KIB, 3 * MIB, paged=True)
        assert sizes.blocks == 192
        assert sizes.resident_tokens is None


def test_without_a_prefix_cache_memory_goes_to_running_sequences() -> None:
    sizes = shape.size(RunnerConfig(sequence_tokens=256, prefix_cache=False), 256, KIB, 3 * MIB)
    assert sizes.blocks == 96


def test_a_derived_length_shrinks_to_what_memory_holds() -> None:
    assert shape.size(RunnerConfig(), 100_000, KIB, 3 * MIB).sequence_tokens == 1024


def test_a_length_that_memory_cannot_hold_stops_the_start() -> None:
    with pytest.raises(SizingError, match="kv_mib"):
        shape.size(RunnerConfig(sequence_tokens=1025), 1025, KIB, 3 * MIB)


def test_no_memory_at_all_stops_the_start() -> None:
    with pytest.raises(SizingError):
        shape.size(RunnerConfig(), 100, KIB, 0)


@given(
    st.integers(1, 64),
    st.integers(16, 4096),
    st.integers(1, 512 * KIB),
    st.integers(1, 4096),
    st.booleans(),
)
def test_what_is_promised_fits_the_budget(
    slots: int, tokens: int, token_bytes: int, budget_mib: int, prefix_cache: bool
) -> None:
    config = RunnerConfig(sequence_tokens=tokens, running_limit=slots, prefix_cache=prefix_cache)
    try:
        sizes = shape.size(config, tokens, token_bytes, budget_mib * MIB)
    except SizingError:
        return
    held = sizes.blocks * sizes.block_tokens
    resident = sizes.resident_tokens if sizes.resident_tokens is not None else slots * tokens
    stored = held if prefix_cache else 0
    assert resident <= held
    assert (2 * resident + stored) * token_bytes <= budget_mib * MIB
    assert held >= tokens


def gemma_like(layers: int = 26) -> list[LayerShape]:
    """One of six layers sees all tokens, the others the last 512; 1 KiB a token and layer in bf16."""
    return [LayerShape(1, 256, 256, None if (layer + 1) % 6 == 0 else 512) for layer in range(layers)]


def test_windows_cost_by_the_slot_and_not_by_the_token() -> None:
    layers = gemma_like()
    windows = shape.kv_bytes_by_window(layers, torch.bfloat16)
    assert windows == {512: 22 * KIB}
    token_bytes = shape.kv_bytes_per_token(layers, torch.bfloat16)
    config = RunnerConfig(sequence_tokens=8192, running_limit=4, prefix_cache=False)
    plain = shape.size(config, 8192, token_bytes, 512 * MIB)
    sizes = shape.size(config, 8192, token_bytes, 512 * MIB, windows)
    assert plain.blocks == 512 * MIB // (2 * 26 * KIB * 16)
    assert plain.resident_tokens == plain.blocks * 16
    assert sizes.blocks == 4 * 512  # every slot full: (2 x 4 KiB x 8192 + 512 x 22 KiB) x 4 fit
    assert sizes.resident_tokens is None
    assert sizes.limits().held_tokens(512) == 512


def test_with_little_memory_windows_cost_no_more_than_without() -> None:
    layers = gemma_like()
    windows = shape.kv_bytes_by_window(layers, torch.bfloat16)
    token_bytes = shape.kv_bytes_per_token(layers, torch.bfloat16)
    config = RunnerConfig(sequence_tokens=64)
    budget = 8 * MIB  # less than the rings of 32 slots
    assert shape.size(config, 64, token_bytes, budget, windows) == shape.size(config, 64, token_bytes, budget)


def test_the_hint_about_memory_is_enough_with_windows() -> None:
    layers = gemma_like()
    windows = shape.kv_bytes_by_window(layers, torch.bfloat16)
    token_bytes = shape.kv_bytes_per_token(layers, torch.bfloat16)
    config = RunnerConfig(sequence_tokens=8192, running_limit=2)
    with pytest.raises(SizingError, match="at least 294") as caught:
        shape.size(config, 8192, token_bytes, 100 * MIB, windows)
    assert "one sequence needs 8192" in str(caught.value)
    assert shape.size(config, 8192, token_bytes, 294 * MIB, windows).sequence_tokens == 8192
    with pytest.raises(SizingError):
        shape.size(config, 8192, token_bytes, 293 * MIB, windows)


@given(
    st.integers(1, 64),
    st.integers(16, 4096),
    st.integers(1, 64 * KIB),
    st.dictionaries(st.integers(1, 8192), st.integers(1, 64 * KIB), min_size=1, max_size=3),
    st.integers(1, 4096),
    st.booleans(),
    st.data(),
)
def test_what_is_promised_with_windows_fits_the_budget(
    slots: int,
    tokens: int,
    full_bytes: int,
    windows: dict[int, int],
    budget_mib: int,
    prefix_cache: bool,
    data: st.DataObject,
) -> None:
    config = RunnerConfig(sequence_tokens=tokens, running_limit=slots, prefix_cache=prefix_cache)
    token_bytes = full_bytes + sum(windows.values())
    try:
        sizes = shape.size(config, tokens, token_bytes, budget_mib * MIB, windows)
    except SizingError:
        return
    # Any split of what may be resident over the slots, each slab doubled and each ring as long as it gets.
    left = sizes.resident_tokens if sizes.resident_tokens is not None else slots * tokens
    spent = sizes.blocks * sizes.block_tokens * token_bytes if prefix_cache else 0
    for _ in range(slots):
        length = min(left, data.draw(st.integers(0, tokens)))
        left -= length
        spent += 2 * length * full_bytes
        for window, cost in windows.items():
            spent += min(2 * length, sizes.limits().held_tokens(window)) * cost
    assert spent <= budget_mib * MIB


def test_a_longer_sequence_than_the_window_stops_the_start() -> None:
    text = SimpleNamespace(max_position_embeddings=512)
    assert shape.wanted_tokens(*shape.reach(text), RunnerConfig(sequence_tokens=512)) == 512
    with pytest.raises(SizingError, match="window"):
        shape.wanted_tokens(*shape.reach(text), RunnerConfig(sequence_tokens=513))
    with pytest.raises(SizingError, match="at least 2"):
        shape.wanted_tokens(*shape.reach(text), RunnerConfig(sequence_tokens=1))


@pytest.mark.parametrize("name", shape.WINDOW_NAMES)
def test_the_window_is_found_under_its_known_names(name: str) -> None:
    assert shape.wanted_tokens(*shape.reach(SimpleNamespace(**{name: 77})), RunnerConfig()) == 77


def test_a_model_without_a_window_gets_a_default() -> None:
    assert shape.wanted_tokens(*shape.reach(SimpleNamespace()), RunnerConfig()) == 2048


def memory(tmp_path: Path, files: dict[str, str]) -> int:
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemTotal:       4096 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return shape.memory_limit_bytes(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4 * MIB),
        ({"memory.max": "max\n"}, 4 * MIB),
        ({"memory.max": "1048576\n"}, MIB),
        ({"memory.max": "9999999999\n"}, 4 * MIB),
        ({"memory/memory.limit_in_bytes": "2097152\n"}, 2 * MIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 4 * MIB),
    ],
)
def test_the_memory_limit_is_the_smaller_of_host_and_cgroup(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert memory(tmp_path, files) == expected


def test_a_set_budget_is_taken_as_it_is() -> None:
    assert shape.kv_budget_bytes(RunnerConfig(kv_mib=7)) == 7 * MIB


def test_a_derived_budget_leaves_a_tenth_and_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "memory_limit_bytes", lambda: 1000)
    monkeypatch.setattr(shape, "resident_bytes", lambda: 300)
    assert shape.kv_budget_bytes(RunnerConfig()) == 600
    monkeypatch.setattr(shape, "resident_bytes", lambda: 3000)
    assert shape.kv_budget_bytes(RunnerConfig()) == 0


def test_this_process_holds_some_memory() -> None:
    assert MIB < shape.resident_bytes() < shape.memory_limit_bytes()


@pytest.mark.parametrize(
    ("setting", "flags", "expected"),
    [
        ("auto", {"avx2", "avx512f"}, torch.float32),
        ("auto", {"avx512_bf16"}, torch.bfloat16),
        ("auto", {"amx_bf16"}, torch.bfloat16),
        ("float32", {"amx_bf16"}, torch.float32),
        ("bfloat16", {"avx2"}, torch.bfloat16),
    ],
)
def test_bf16_is_computed_only_where_hardware_multiplies_it(
    setting: str, flags: set[str], expected: torch.dtype
) -> None:
    assert shape.compute_dtype(setting, frozenset(flags)) == expected


def test_an_unknown_dtype_stops_the_start() -> None:
    with pytest.raises(SizingError, match="float16"):
        shape.compute_dtype("float16", frozenset())


def cpuinfo(tmp_path: Path, cores: list[int]) -> Path:
    entries = [
        f"processor : {i}\nphysical id : 0\ncore id : {c}\nflags : avx2 fma\n" for i, c in enumerate(cores)
    ]
    (tmp_path / "cpuinfo").write_text("\n".join(entries))
    return tmp_path


def test_hyperthreads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    proc = cpuinfo(tmp_path, [0, 1, 2, 3, 0, 1, 2, 3])
    assert shape.physical_cores(tmp_path, proc) == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 4})
    assert shape.physical_cores(tmp_path, proc) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
    ],
)
def test_a_cpu_quota_limits_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert shape.physical_cores(tmp_path, cpuinfo(tmp_path, list(range(6)))) == expected


def test_cpu_flags_are_read(tmp_path: Path) -> None:
    assert shape.cpu_flags(cpuinfo(tmp_path, [0])) == {"avx2", "fma"}


@pytest.mark.parametrize(
    ("setting", "cores", "expected"), [(None, 2, 2), (None, 4, 4), (None, 8, 7), (3, 8, 3)]
)
def test_one_core_of_many_is_left_to_others(setting: int | None, cores: int, expected: int) -> None:
    assert shape.compute_threads(setting, cores) == expected


def test_zero_threads_stop_the_start() -> None:
    with pytest.raises(SizingError, match="threads"):
        shape.compute_threads(0, 4)
