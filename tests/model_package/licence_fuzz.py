"""Hostile licences and unlock messages for as long as asked: no crash, no hang, bounded memory.

`python -m tests.model_package.licence_fuzz --seconds 600 --seed 1`; a short form is in the suite.
Owns: the mutations and the limits. Must not know: what is inside the parsers.
Invariant: the same seed and count give the same cases; a parser answers with a value or its own refusal.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

from model_package import hpke, licence_form, signing_keys, unlock
from model_package.licence_form import Licence, Terms, WrappedKey
from model_package.manifest import Base
from model_package.refusal import KeyRefused
from model_package.signature import Root

CASE_S = 1.0  # the slowest case allowed, in processor time; measured ones take under 10 ms
PEAK_BYTES = 64 << 20  # what one case may allocate: the largest licence is 0.5 MiB
SIGNED = "licence file"
NOW_S = 1_800_000_000
WORDS = [
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"\n", b" ", b"\0", b"\xff", b"\xef\xbb\xbf"),
    *(
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-0",
        b"0" * 400,
        b"9" * 5000,
        b"\\u0000",
        b"\\ud800",
    ),
    *(
        b'"terms":',
        b'"keys":',
        b'"id":',
        b'"extra":1,',
        b"[" * 3000,
        b'{"a":' * 3000,
        b'"' + b"a" * 70000 + b'"',
    ),
]


def sample() -> Licence:
    key = WrappedKey(ciphertext="ab" * 48, encapsulated="cd" * 32, key_id="01" * 16, package_id="02" * 16)
    agreed = Terms(
        customer="Fuzz",
        epoch_min=1,
        features=("a", "b"),
        format=1,
        id="fuzz",
        not_after_s=NOW_S + 1,
        not_before_s=NOW_S - 1,
        package_ids=("02" * 16, "03" * 16),
    )
    return Licence(keys=(key,), terms=agreed)


def mutated(rng: random.Random, whole: bytes) -> bytes:
    """Return `whole` with one to eight cuts, flips, insertions, repetitions or swaps."""
    text = bytearray(whole)
    for _ in range(rng.randint(1, 8)):
        at = rng.randint(0, len(text))
        upto = min(len(text), at + rng.choice((1, 1, 2, 8, 64, 4096)))
        match rng.randint(0, 6):
            case 0:
                del text[at:upto]
            case 1 if at < len(text):
                text[at] ^= 1 << rng.randint(0, 7)
            case 2:
                text[at:at] = rng.choice(WORDS)
            case 3:
                text[at:upto] = rng.randbytes(upto - at)
            case 4 if len(text) < 1 << 20:
                text[at:at] = text[at:upto] * rng.randint(1, 40)
            case 5:
                other = rng.randint(0, len(text))
                text[at:upto], text[other : other + 8] = text[other : other + 8], text[at:upto]
            case _:
                text[at:] = b""
    return bytes(text)


def targets() -> dict[str, tuple[Callable[[bytes], object], bytes]]:
    """Return name -> (parser, a valid input); the body's is reached past a signature, and directly."""
    private = signing_keys.make_private()
    public = signing_keys.public_of(private)
    signed = licence_form.sign(sample(), private)
    roots = [Root(public)]

    def resigned(body: bytes) -> object:
        signature = signing_keys.sign(private, licence_form.PURPOSE, body)
        head = f"strongroom licence 1 {signing_keys.key_id(public).hex()} {signature.hex()}\n".encode()
        return licence_form.verify(head + body + b"\n", roots, NOW_S)

    body = signed.partition(b"\n")[2][:-1]
    container = unlock.Container(Base(content_sha256="ab" * 32, package_id="cd" * 16), "1")
    described = container.describe()
    told = json.loads(described)
    message = unlock.Message(
        challenge=told["challenge"],
        ciphertext="ab" * 48,
        container_key=told["container_key"],
        encapsulated=hpke.public_of(hpke.make_private()).hex(),
        format=1,
        package=Base(**told["base"]),
    )
    return {
        SIGNED: (lambda raw: licence_form.verify(raw, roots, NOW_S), signed),
        "licence body": (licence_form.parse, body),
        "signed body": (resigned, body),
        "unlock message": (
            lambda raw: unlock._parse(raw, unlock._MESSAGES),
            msgspec.json.encode(message),
        ),
        "description": (lambda raw: unlock._parse(raw, unlock._DESCRIPTIONS), described),
    }


def run(seed: int, cases: Iterator[int]) -> dict[str, Counter[str]]:
    """Return how each target answered; raises AssertionError at the first breach of a limit."""
    rng = random.Random(seed)
    answers: dict[str, Counter[str]] = {}
    parsers = targets()
    tracemalloc.start()
    try:
        for _ in cases:
            for name, (parse, valid) in parsers.items():
                case = mutated(rng, valid)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                began_s = time.process_time()
                try:
                    parse(case)
                    answer = "taken"
                    assert name != SIGNED or case == valid, "a changed file was accepted"
                except KeyRefused as refused:
                    answer = refused.refusal.value
                spent_s = time.process_time() - began_s
                peak = tracemalloc.get_traced_memory()[1] - before
                assert spent_s < CASE_S, f"{name}: {spent_s:.2f} s for {len(case)} bytes"
                assert peak < PEAK_BYTES, f"{name}: {peak} bytes for {len(case)} bytes"
                answers.setdefault(name, Counter())[answer] += 1
    finally:
        tracemalloc.stop()
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    end_s = time.monotonic() + given.seconds

    def until() -> Iterator[int]:
        case = 0
        while time.monotonic() < end_s:
            yield case
            case += 1

    answers = run(given.seed, until())
    shown = {
        "cases": sum(sum(counts.values()) for counts in answers.values()),
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "answers": {name: dict(counts) for name, counts in answers.items()},
    }
    print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
