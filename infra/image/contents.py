"""What the image holds and, mostly, what it does not: lists that the build reads and a person can judge.

Owns: which parts of packages are left out and why, which Debian files are taken, users.
Must not know: how files are copied. Lists only.
Invariant: nothing is taken by a rule that could let a shell, a compiler or a package manager in: files come
by name, or because something that came by name is linked against them.
"""

from __future__ import annotations

from typing import Final

SERVICE_ID: Final = 10001
VENV: Final = "/opt/strongroom"
PYTHON: Final = "/usr/bin/python3.11"
STDLIB: Final = "/usr/lib/python3.11"

# Of the standard library: what tests, draws, installs or talks to a terminal.
STDLIB_LEFT_OUT: Final = (
    *("test", "idlelib", "ensurepip", "lib2to3", "tkinter", "turtledemo", "pydoc_data", "curses", "dbm"),
    *("sqlite3", "distutils", "site-packages", "dist-packages", "sitecustomize.py", "turtle.py", "venv"),
    *("EXTERNALLY-MANAGED", "__pycache__"),
)
EXTENSIONS_LEFT_OUT: Final = (
    *("_curses", "_curses_panel", "_dbm", "_gdbm", "_sqlite3", "_tkinter", "readline", "nis", "ossaudiodev"),
    *("_testbuffer", "_testcapi", "_testclinic", "_testimportmultiple", "_testinternalcapi"),
    *("_testmultiphase", "_xxtestfuzz", "_xxsubinterpreters", "xxlimited", "xxlimited_35"),
)
# Of installed packages, as patterns below site-packages: what only builds or tests. Each with its reason.
PACKAGES_LEFT_OUT: Final[dict[str, str]] = {
    "torch/test/*": "86 MB of test programs",
    "torch/bin/test_*": "39 MB of test programs",
    "torch/bin/*Test*": "test programs",
    "torch/bin/protoc*": "a compiler of interface files",
    "torch/include/*": "39 MB of headers, for extensions that are compiled",
    "torch/share/*": "build scripts for extensions",
    "torch/lib/libtorchbind_test.so": "a test's library",
    "torch/lib/libbackend_with_compiler.so": "a test's library",
    "torch/lib/libjitbackend_test.so": "a test's library",
    "torch/lib/libaoti_custom_ops.so": "a test's library",
    "torch/utils/benchmark/examples/*": "examples",
    "transformers/testing_utils.py": "its own tests' helpers, with a token of their hub account",
    "*.pyi": "for type checkers",
    "*/tests/*": "tests of packages",
    "gevent/testing/*": "tests of packages",
    "numpy/_core/include/*": "headers, for extensions that are compiled",
    "numpy/f2py/*": "builds Fortran extensions",
    "greenlet/*.h": "a header",
    "greenlet/platform/*": "assembler sources",
    "*.pxd": "for Cython",
    "*.pyx": "for Cython",
    "setuptools/*.exe": "programs for another system",
    "distutils-precedence.pth": "runs at every start of Python, for code older than this Python",
}
# The CPU variant's only: bitsandbytes carries one library per CUDA and ROCm version.
CPU_LEFT_OUT: Final[dict[str, str]] = {
    "bitsandbytes/libbitsandbytes_cuda*": "needs a GPU",
    "bitsandbytes/libbitsandbytes_rocm*": "needs a GPU",
    "bitsandbytes/libbitsandbytes_xpu*": "needs a GPU",
}
# The project's own rooms that nothing in the image runs: the command for other machines.
ROOMS_LEFT_OUT: Final[dict[str, str]] = {
    "infra/*": "runs on an operator's machine",
    "container/kernels/csrc/*": "sources of what is compiled",
    "container/kernels/build_hook.py": "needs a build backend",
    "container/model/quality/*": "measures models beforehand, with packages that are not here",
}
# The commands there are beside the interpreter; those that packages install are not needed, and some would
# open a way around the entry point.
VERBS: Final = ("serve", "train")

PASSWD: Final = (
    "root:x:0:0:root:/nonexistent:/nonexistent\n"
    f"strongroom:x:{SERVICE_ID}:{SERVICE_ID}:strongroom:/nonexistent:/nonexistent\n"
)
GROUP: Final = f"root:x:0:\nstrongroom:x:{SERVICE_ID}:\n"
NSSWITCH: Final = "passwd: files\ngroup: files\nhosts: files\n"
# One command for a platform that names none, and one per verb for a platform that calls them by name.
COMMAND: Final = """#!{venv}/bin/python -IB
import sys
from sagemaker_entry.__main__ import main
sys.exit(main(["{verb}"]))
"""
