"""Compiles the native operators while the package is built; the wheel then carries them, and no compiler.

Owns: which files are compiled with which flags, what to do without a compiler.
Must not know: what the operators do. Runs inside the build backend: standard library and hatchling only.
Invariant: the library is made from the sources beside this file or the build fails, unless
STRONGROOM_NATIVE=0 asks for a package without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES: Final = Path(__file__).resolve().parent / "csrc"
LIBRARY: Final = "libstrongroom.so"
# -ffp-contract=fast: products are added unrounded where the machine can. No -ffast-math: NaN must stay NaN.
COMMON: Final = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
)
LINK: Final = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,-z,relro,-z,now", "-Wl,-s")


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Return the flags of every set that is compiled for the machine's architecture."""
    sets: dict[str, tuple[str, ...]] = {"plain": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        sets["avx2"] = ("-mavx2", "-mfma", "-mf16c")
        # the compiler's own vectors stay 8 floats wide; products with blocks use wider ones by name
        wider = ("f", "bw", "vl", "dq", "vnni")
        sets["avx512"] = (*sets["avx2"], *(f"-mavx512{name}" for name in wider), "-mprefer-vector-width=256")
        sets["avx512bf16"] = (*sets["avx512"], "-mavx512bf16")
    return sets


def compiler() -> str | None:
    """Return the C++ compiler: CXX, or c++ or g++ or clang++ on the path."""
    named = os.environ.get("CXX")
    return named or next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def build(target: Path) -> None:
    """Compile everything into the shared library `target`; raises RuntimeError with the compiler's words."""
    chosen = compiler()
    if chosen is None:
        raise RuntimeError(
            "no C++ compiler for the native operators\n"
            "hint: install g++ or clang++, or set STRONGROOM_NATIVE=0 to build without them (slower on CPU)"
        )
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        jobs: list[tuple[str, str, tuple[str, ...]]] = [("team.cpp", "team", ()), ("api.cpp", "api", ())]
        jobs += [
            ("isa.cpp", f"isa-{name}", (f"-DSTRONGROOM_ISA={name}", *flags))
            for name, flags in instruction_sets().items()
        ]
        for source, name, flags in jobs:
            made = f"{folder}/{name}.o"
            _run([chosen, *COMMON, *flags, "-c", str(SOURCES / source), "-o", made])
            objects.append(made)
        made = f"{folder}/{LIBRARY}"
        _run([chosen, *objects, *LINK, f"-Wl,--version-script={SOURCES / 'exports.map'}", "-o", made])
        target.unlink(missing_ok=True)  # a running process keeps the old one
        shutil.move(made, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    if done.returncode:
        raise RuntimeError(f"the native operators do not compile: {' '.join(command)}\n{done.stderr[-4000:]}")


class NativeOperators(BuildHookInterface[Any]):  # type: ignore[misc]  # hatchling has no types
    """What hatchling calls before it packs a wheel or links an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface
        if os.environ.get("STRONGROOM_NATIVE") == "0":
            return
        target = Path(self.root) / "container" / "kernels" / LIBRARY
        build(target)
        build_data["artifacts"].append(f"container/kernels/{LIBRARY}")
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        build_data["pure_python"] = False


if __name__ == "__main__":
    build(SOURCES.parent / LIBRARY)
