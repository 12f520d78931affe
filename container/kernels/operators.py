"""The native operators as Python calls them: found beside this file, opened once per runner.

Owns: the library's lifetime, the C structures, which instruction set is used.
Must not know: torch modules, models, requests. Addresses come from tensors that the caller keeps alive.
Invariant: every size is checked by the caller before it gets here; the library trusts what it is handed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Final

LIBRARY: Final = Path(__file__).with_name("libstrongroom.so")


class NativeMissing(OSError):
    """The package was built without native operators, or for another machine."""


class AttentionLayer(ctypes.Structure):
    """One layer's attention; see csrc/attention.hpp."""

    _fields_ = (
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("key_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
    )


class Paging(ctypes.Structure):
    """How positions lie in pages; see csrc/attention.hpp."""

    _fields_ = (("page_tokens", ctypes.c_int32), ("type", ctypes.c_int32))


class Row(ctypes.Structure):
    """Consecutive tokens of one sequence; see csrc/attention.hpp."""

    _fields_ = (
        ("first", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("pages", ctypes.c_void_p),
    )


class BlockWeight(ctypes.Structure):
    """A weight in blocks of integers; see csrc/gemm.hpp."""

    _fields_ = (
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("lows", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Activations(ctypes.Structure):
    """Inputs in blocks of integers; see csrc/gemm.hpp."""

    _fields_ = (("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("sums", ctypes.c_void_p))


class DecoderLayer(ctypes.Structure):
    """One layer of the fused decoder; see csrc/decoder.hpp."""

    _fields_ = (
        ("attention", AttentionLayer),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("qkv", BlockWeight),
        ("output", BlockWeight),
        ("gate_up", BlockWeight),
        ("down", BlockWeight),
    )


class Decoder(ctypes.Structure):
    """The fused decoder; see csrc/decoder.hpp."""

    _fields_ = (
        ("hidden", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("layer_count", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("rotated", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("plain", ctypes.c_int32),
        ("layers", ctypes.c_void_p),
        ("last_norm", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("head", BlockWeight),
        ("paging", Paging),
    )


class DecoderStep(ctypes.Structure):
    """One forward; see csrc/decoder.hpp."""

    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("row_count", ctypes.c_int32),
        ("wanted_count", ctypes.c_int32),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


class Scratch(ctypes.Structure):
    """Room for one forward's intermediate results; see csrc/decoder.hpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
        ("quantized", Activations),
        ("widest", ctypes.c_int64),
        ("own_rows", ctypes.c_void_p),
        ("own_quantized", Activations),
        ("attention", ctypes.c_void_p),
        ("attention_floats", ctypes.c_int64),
    )


@cache
def load() -> ctypes.CDLL:
    """Return the loaded library; raises NativeMissing."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        raise NativeMissing("the native operators are not built") from None
    loaded.strongroom_open.restype = ctypes.c_void_p
    loaded.strongroom_open.argtypes = [ctypes.c_char_p, ctypes.c_int32]
    loaded.strongroom_close.argtypes = [ctypes.c_void_p]
    loaded.strongroom_isa.restype = ctypes.c_char_p
    loaded.strongroom_isa.argtypes = [ctypes.c_void_p]
    return loaded


def native_operators() -> bool:
    """Return whether the package was built with native operators for this machine."""
    try:
        load()
    except NativeMissing:
        return False
    return True


class Native:
    """The operators with a team of `threads` threads; `isa` limits the instruction set, for tests."""

    def __init__(self, threads: int, isa: str | None = None) -> None:
        assert threads >= 1, "a team has a thread"
        self._handle: int | None = None
        self._library = load()
        name = None if isa is None else isa.encode()
        self.threads = threads
        self._handle = self._library.strongroom_open(name, threads)

    @property
    def isa(self) -> str:
        """The instruction set in use: `plain`, `avx2`, ..."""
        name: bytes = self._library.strongroom_isa(self._opened)
        return name.decode()

    @property
    def _opened(self) -> int:
        assert self._handle is not None, "the operators were closed"
        return self._handle

    def call(self, function: str, *arguments: Any) -> None:
        """Call `function` of the library with this team; blocks until all threads are done."""
        getattr(self._library, function)(ctypes.c_void_p(self._opened), *arguments)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; whoever still holds weights for them closes it by letting go."""
        if self._handle is not None:
            self._library.strongroom_close(self._handle)
            self._handle = None
