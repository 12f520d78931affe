"""Hostile bytes for every parser of the format: python -m tests.model_package.fuzz --seconds 600.

Owns: making inputs from good ones, by structure and by bytes, and the rule that a parser ends in a value or
in a typed error, soon, in bounded memory. Must not know: what any input should give.
Invariant: everything follows from the seed; an input that broke the rule is named by seed and number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from model_package import layout, manifest, signature, toc
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from tests.model_package import making, recipes
from tests.model_package.forge import Package, canonical, pack_header, sealed
from tests.model_package.recipes import config_file, model_file

SLOWEST_S = 2.0  # of CPU, for one input of at most INPUT_BYTES
INPUT_BYTES = 1 << 18
MEMORY_BYTES = 64 << 20  # above what was there before: 256 times the largest input
NUMBERS = [
    -1,
    0,
    1,
    7,
    8,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**38 + 1,
    2**50 + 1,
    2**63,
    2**64,
    10**400,
    1.5,
    True,
    None,
]
STRINGS = ["", "a", "A" * 600, "..", "a/b", "\0", "\ud800", "\u00e9", "ab" * 16, "ab" * 32, "kms", "U8", "F4"]


class Broken(Exception):
    """A parser that did not keep the rule."""


def good() -> dict[str, bytes]:
    """Return one good input of each kind."""
    package = Package([config_file(), model_file()], recipients=["one", "two"])
    files = package.files()
    return {
        "manifest": files["manifest.json"],
        "signature": files["manifest.sig"],
        "header": sealed(model_file(), package.package_id)[:64],
        "toc": canonical(recipes.MODEL | {"__metadata__": {"format": "pt"}}),
        "recipients": canonical(json.loads(files["manifest.json"])["recipients"]),
    }


def parse_recipients(raw: bytes) -> object:
    """Put a list of recipients into a good manifest: that is where they are parsed."""
    listed = json.loads(good_manifest())
    listed["recipients"] = None
    return manifest.parse(canonical(listed).replace(b'"recipients":null', b'"recipients":' + raw))


def good_manifest() -> bytes:
    return _GOOD["manifest"]


def parse_header(raw: bytes) -> object:
    header = layout.parse_header(raw, 2**38)
    assert header.index_bytes <= 16 << 20 and header.toc_bytes <= 16 << 20
    return header


def parse_signature(raw: bytes) -> object:
    return signature.check(raw, good_manifest(), making.ROOTS, Owner.VENDOR, making.NOW_S)


def parse_toc(raw: bytes) -> object:
    entries = toc.parse(raw, raw.count(b"data_offsets"))
    header = layout.Header(
        12, b"f" * 16, b"p" * 16, len(entries) + 1, layout.MAX_CHUNKS, len(raw), layout.Kind.TENSORS
    )
    return layout.place(header, [entry.data_bytes for entry in entries], 2**38)


_GOOD = good()
PARSERS: dict[str, Callable[[bytes], object]] = {
    "manifest": manifest.parse,
    "signature": parse_signature,
    "header": parse_header,
    "toc": parse_toc,
    "recipients": parse_recipients,
}


def edit_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Return `raw` with a few of its bytes flipped, cut out, repeated, moved or replaced."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        begin = rng.randrange(len(out) + 1)
        end = min(len(out), begin + rng.choice((1, 2, 4, 8, 100)))
        kind = rng.randrange(6)
        if kind == 0 and begin < len(out):
            out[begin] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[begin:end]
        elif kind == 2:
            out[begin:end] = out[begin:end] * rng.choice((2, 3, 50))
        elif kind == 3:
            out[begin:end] = rng.randbytes(end - begin)
        elif kind == 4:
            out[begin:end] = rng.choice((b"\xff", b"\0", b"{", b"[", b'"', b"\\", b",", b"0", b" ")) * (
                end - begin
            )
        else:
            out[begin:begin] = rng.choice(
                (b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b'"' * 99, b"\\u0000" * 99)
            )
    return bytes(out[:INPUT_BYTES])


def edit_value(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one thing changed somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(sorted(value))
        kind = rng.randrange(8)
        changed = dict(value)
        if kind == 0:
            del changed[name]
        elif kind == 1:
            changed[rng.choice(STRINGS)] = changed.pop(name)
        elif kind == 2:
            changed[rng.choice(STRINGS)] = changed[name]
        else:
            changed[name] = edit_value(changed[name], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        kind = rng.randrange(6)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return value[:place] + [value[place]] * rng.choice((2, 70, 5000)) + value[place:]
        if kind == 2:
            return value[::-1]
        return [*value[:place], edit_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.5:
        place = rng.randrange(len(value) + 1)
        return value[:place] + rng.choice(["", "0", "A", "/", "..", " ", value]) + value[place + 1 :]
    return rng.choice([*NUMBERS, *STRINGS, [], {}, [[]], {"a": {}}, [0] * 20])


def make(kind: str, rng: random.Random) -> bytes:
    """Return one hostile input for the parser `kind`."""
    raw = _GOOD[kind]
    if kind == "header" and rng.random() < 0.5:
        names = ("segments", "chunks", "toc_length", "kind", "log2_chunk", "suite")
        sizes = {"segments": 32, "chunks": 32, "toc_length": 64, "kind": 8, "log2_chunk": 8, "suite": 8}
        fields = {
            "magic": raw[:6], "suite": 1, "log2_chunk": 12, "file_id": raw[8:24], "package_id": raw[24:40],
            "segments": 5, "chunks": 7, "toc_length": 300, "kind": 1, "reserved": bytes(7),
        }  # fmt: skip
        for name in rng.sample(names, rng.randrange(1, 4)):
            most = 2 ** sizes[name]
            fields[name] = rng.choice((0, 1, most - 1, most // 2, rng.randrange(most)))
        return pack_header(fields)
    if kind in {"header", "signature"} or rng.random() < 0.4:
        return edit_bytes(raw, rng)
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = edit_value(value, rng)
    return canonical(value)[:INPUT_BYTES]


def attack(kind: str, raw: bytes) -> Outcome:
    """Parse `raw`; raises Broken for anything but a value or a typed error in time."""
    begun = time.process_time()
    try:
        PARSERS[kind](raw)
        outcome = Outcome.OPENED
    except PackageError as error:
        outcome = error.outcome
    except Exception as error:
        raise Broken(f"{kind}: {type(error).__name__}") from error
    if time.process_time() - begun > SLOWEST_S:
        raise Broken(f"{kind}: {time.process_time() - begun:.1f} s for {len(raw)} bytes")
    return outcome


def peak_memory(kind: str, raw: bytes) -> int:
    """Return the bytes that parsing `raw` held at most."""
    tracemalloc.start()
    try:
        with contextlib.suppress(PackageError):
            PARSERS[kind](raw)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(seed: int, seconds: float, report: Callable[[str], None]) -> dict[str, dict[str, int]]:
    """Attack all parsers in turn for `seconds`; return parser -> outcome -> count. Raises Broken."""
    seen: dict[str, dict[str, int]] = {kind: {} for kind in PARSERS}
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        for kind in PARSERS:
            raw = make(kind, random.Random(f"{seed}/{kind}/{number}"))
            try:
                outcome = attack(kind, raw)
                if number % 500 == 0 and peak_memory(kind, raw) > MEMORY_BYTES:
                    raise Broken(f"{kind}: more than {MEMORY_BYTES} bytes of memory")
            except Broken as error:
                raise Broken(f"seed {seed}, number {number}: {error}") from error
            seen[kind][outcome] = seen[kind].get(outcome, 0) + 1
        number += 1
        if number % 20_000 == 0:
            report(f"{number} inputs for each parser")
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    seen = run(chosen.seed, chosen.seconds, lambda line: print(line, file=sys.stderr))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seed": chosen.seed, "peak_rss_mib": peak_kib // 1024, "seen": seen}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
