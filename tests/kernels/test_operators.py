"""The native library: what it is built from, which instruction set it takes, how its threads end."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from container.kernels import blocks, build_hook, int8, operators
from container.kernels.block_weight import Kind
from container.kernels.operators import Native, NativeMissing


def test_the_widest_set_the_machine_has_is_used_and_can_be_limited() -> None:
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    wanted = {
        "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
        "avx2": {"avx2", "fma", "f16c"},
        "plain": set[str](),
    }
    had = [isa for isa, needed in wanted.items() if needed <= flags]
    assert Native(1).isa == had[0]
    assert [Native(1, isa).isa for isa in had] == had


def test_teams_of_every_size_agree_over_many_short_calls() -> None:
    """Many short calls are what a race between threads would show in."""
    arranged = int8.arrange(
        torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40, 2).to(torch.float16)
    )
    x = torch.randn(3, 64)
    expected = blocks.multiply(Native(1), arranged, x)
    for threads in (2, 3, 5):
        native = Native(threads)
        for _ in range(300):
            assert torch.equal(blocks.multiply(native, arranged, x), expected)


def test_threads_end_when_a_team_is_closed_or_let_go() -> None:
    def running() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = running()
    native, other = Native(4), Native(3)
    assert running() == before + 5
    native.close()
    native.close()
    del other
    deadline = time.monotonic() + 5
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running() == before
    with pytest.raises(AssertionError, match="closed"):
        _ = native.isa


def test_an_idle_team_uses_no_cpu_time() -> None:
    native = Native(3)
    blocks.quantize(native, torch.randn(4, 64), Kind.INT8)
    time.sleep(0.05)
    begun = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - begun < 0.02
    native.close()


def test_a_package_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    operators.load.cache_clear()
    monkeypatch.setattr(operators, "LIBRARY", tmp_path / "libstrongroom.so")
    try:
        with pytest.raises(NativeMissing, match="not built"):
            Native(1)
    finally:
        operators.load.cache_clear()


def test_the_build_makes_the_library_and_tells_what_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "libstrongroom.so"
    build_hook.build(target)
    script = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).strongroom_open"
    subprocess.run([sys.executable, "-c", script, str(target)], check=True)
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(target)], capture_output=True, text=True)
    named = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert named and all(name.startswith("strongroom_") for name in named)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        build_hook.build(target)
    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / "team.cpp").write_text("nonsense\n")
    monkeypatch.undo()
    monkeypatch.setattr(build_hook, "SOURCES", broken)
    with pytest.raises(RuntimeError, match="do not compile"):
        build_hook.build(target)


def test_the_wheel_carries_the_library_and_is_of_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert "container/kernels/libstrongroom.so" in names
    assert not any(name.startswith("tests/") for name in names)
