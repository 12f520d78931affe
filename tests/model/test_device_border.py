"""The device's library stays behind one border: files that may name it, and a CPU image without Triton."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Who answers for a device, and the quantized products that asked before there was a border.
MAY_NAME_CUDA = {
    "device_cuda.py", "device_triton.py", "quantize_fp8.py", "quantize_bnb.py", "quantize_choose.py",
    "preparation.py", "surgery.py",
}  # fmt: skip
NAMES = re.compile(r"\btorch\.cuda\b|\.is_cuda\b|\bCUDAGraph\b|\bpin_memory\b|\bimport triton\b")


def code_of(path: Path) -> str:
    """Return the file without comments and docstrings."""
    text = re.sub(r'"""[\s\S]*?"""', "", path.read_text(encoding="utf-8"))
    return re.sub(r"#.*", "", text)


def test_only_the_border_names_a_devices_library() -> None:
    for path in sorted((ROOT / "container" / "model").rglob("*.py")):
        if path.name not in MAY_NAME_CUDA:
            assert not NAMES.search(code_of(path)), path.name


def test_the_pattern_sees_what_it_forbids() -> None:
    assert NAMES.search(code_of(ROOT / "container" / "model" / "device_cuda.py"))


@pytest.mark.parametrize(
    "module", ["container.model.build", "container.model.start", "container.model.device_runner"]
)
def test_a_server_without_a_gpu_never_imports_triton(module: str) -> None:
    code = (
        "import sys, importlib.abc\n"
        "class Blocked(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'triton': raise ImportError(name)\n"
        f"sys.meta_path.insert(0, Blocked())\nimport {module}\n"
        "import container.model.device_cpu\nassert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
