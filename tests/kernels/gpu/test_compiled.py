"""Every kernel compiles for a device that is not there, within what such a device has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent.parent
SHARED_BYTES = 227 << 10  # of one multiprocessor of capability 9.0, CUDA programming guide, table of limits


@cache
def compiled() -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gpu.compiled", "90"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "kernel",
    [
        "attend", "combine", "rms_norm", "gated", "quantize_rows", "rotate_and_store", "multiply", "write_out"
    ],
)  # fmt: skip
def test_a_kernel_compiles_for_a_hopper_device(kernel: str) -> None:
    variants = [one for one in compiled() if one["kernel"] == kernel]
    assert variants and all(one["cubin_bytes"] > 0 for one in variants)
    assert all(one["shared_bytes"] <= SHARED_BYTES for one in variants)


@pytest.mark.parametrize("kernel", ["attend", "multiply"])
def test_products_use_tensor_cores_and_wide_loads(kernel: str) -> None:
    assert all(one["tensor_cores"] and one["vector_loads"] for one in compiled() if one["kernel"] == kernel)
