"""Compiles every kernel as the launchers call it, for a device that is not there, and tells what came out.

Run as `TRITON_INTERPRET=0 python -m tests.kernels.gpu.compiled ARCH...` (80, 89, 90); the last line of stdout
is one compact JSON document. The arguments of real launches on CPU tensors are noted instead of run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled

from container.kernels.gpu import attention_kernel, int4, int4_kernel, layer, layer_kernels
from container.kernels.gpu.attention import Tuning
from tests.kernels.gpu.attention_cases import Case, PagedShape, make, run

KERNELS = {
    attention_kernel: ("attend", "combine"),
    layer_kernels: ("rms_norm", "gated", "quantize_rows", "rotate_and_store"),
    int4_kernel: ("multiply", "write_out"),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNED = 16  # what Triton compiles a variant of its own for
LLAMA_8B = PagedShape(32, 8, 128, 128, 128**-0.5)


@dataclass
class Launch:
    """One call of a kernel: the function and what it was given."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands for a kernel and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **named: Any) -> None:
            names = self._kernel.arg_names
            options = {key: named.pop(key) for key in ("num_warps", "num_stages") if key in named}
            arguments = {**dict(zip(names, given, strict=False)), **named}
            assert set(arguments) == set(names)
            if "WIDE" in arguments:  # set on a CPU alone, for the interpreter
                arguments["WIDE"] = False
            self._launches.append(Launch(self._kernel, arguments, options))

        return launch


def launches() -> list[Launch]:
    """Return the launches of every kernel in the variants that a served model needs."""
    noted: list[Launch] = []
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Recorder(getattr(module, name), noted))
    for call in _calls():
        call()
    return noted


def _calls() -> Iterator[Callable[[], object]]:
    rows, dtype = ((1, 40), (5, 30)), torch.bfloat16
    for case in (
        Case(LLAMA_8B, rows, dtype=dtype),
        Case(LLAMA_8B, rows, dtype=dtype, tuning=Tuning(splits=8, tile=64)),
        Case(LLAMA_8B, rows, dtype=dtype, tuning=Tuning(block_rows=64, tile=64)),
        Case(LLAMA_8B, rows, dtype=dtype, fp8=True),
        Case(PagedShape(8, 1, 256, 256, 0.06, 100, 50.0), rows, dtype=dtype, sinks=True),
        Case(PagedShape(14, 2, 96, 96, 0.1), rows, dtype=torch.float16),
    ):
        yield lambda case=case: run(case, make(case))
    wide, weight = torch.zeros(4, 4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    eight, scales = torch.zeros(4, 4096, dtype=torch.float8_e4m3fn), torch.zeros(4)
    yield lambda: layer.rms_norm(wide, weight, torch.empty_like(wide), 1e-5, residual=wide.clone())
    yield lambda: layer.rms_norm(wide, weight, eight, 1e-5, residual=wide.clone(), scales=scales)
    both = torch.zeros(4, 2 * 14336, dtype=torch.bfloat16)
    yield lambda: layer.gated(both, torch.empty(4, 14336, dtype=torch.bfloat16), layer.Gate.SILU)
    narrow = torch.empty(4, 14336, dtype=torch.float8_e4m3fn)
    yield lambda: layer.gated(both, narrow, layer.Gate.GELU_TANH, scales=scales)
    for rounding in (layer.Rounding.FP8, layer.Rounding.INT8):
        yield lambda rounding=rounding: layer.quantize_rows(wide, rounding)
    for kept in (torch.bfloat16, torch.float8_e4m3fn):
        yield lambda kept=kept: _store(kept)
    packed = int4.pack(torch.zeros(4096, 4096), 128)
    yield lambda: int4.linear(wide, packed)
    yield lambda: int4.linear(torch.zeros(64, 4096, dtype=torch.bfloat16), packed)


def _store(kept: torch.dtype) -> None:
    pages = torch.zeros(3, 16, 8, 128, dtype=kept)
    scaled = (torch.ones(8), torch.ones(8)) if kept is torch.float8_e4m3fn else (None, None)
    angles, ints = torch.zeros(64, 64), torch.zeros(4, dtype=torch.int32)
    qkv, queries = (torch.zeros(4, heads, 128, dtype=torch.bfloat16) for heads in (48, 32))
    head = torch.ones(128, dtype=torch.bfloat16)
    for norms in (None, layer.HeadNorms(head, head, 1e-6)):
        pool = layer.Pool(pages, pages.clone(), *scaled)
        layer.rotate_and_store(qkv, queries, layer.Rotation(angles, angles), ints, ints, pool, norms)


def compile_one(launch: Launch, arch: int) -> dict[str, Any]:
    """Return what the compiler made of `launch` for compute capability `arch`."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if launch.kernel.params[index].is_constexpr:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", ALIGNED]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % ALIGNED == 0:
                attributes[(index,)] = [["tt.divisibility", ALIGNED]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = compiled(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = made.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "shared_bytes": made.metadata.shared,
        "cubin_bytes": len(made.asm["cubin"]),
        "tensor_cores": "mma" in ptx,
        "vector_loads": ".v4" in ptx or "cp.async" in ptx,
    }


if __name__ == "__main__":
    noted = launches()
    print(json.dumps([compile_one(one, int(arch)) for arch in sys.argv[1:] for one in noted]))
