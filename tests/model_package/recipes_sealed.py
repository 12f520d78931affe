"""The vectors of FORMAT.md 5, 6, 7 and 8.4 to 8.7: sealed files, keys, recipients.

Owns: one recipe per vector, each with one thing wrong. Must not know: model_package.
Invariant: a recipe's name is the fault; nothing is random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.model_package.forge import (
    CHUNK,
    Files,
    Forged,
    Json,
    Package,
    canonical,
    secret,
    wrap,
)
from tests.model_package.recipes import DATA, EMBED, MODEL, Recipe, config_file, model_file, small, vector

BODY = 64 + 32 * 7  # of the model's file: one chunk of table, three, one, one, one
FIRST = BODY + len(canonical(MODEL)) + 16  # where its first tensor lies
STEP = CHUNK + 16


def whole(**wrong: object) -> Package:
    return Package([model_file(**wrong)])


def tampered(edit: Callable[[bytes], bytes]) -> Files:
    """Return the good package with its model file edited after signing."""
    files = whole().files()
    name = next(name for name in files if name.endswith(".sealed"))
    return files | {name: edit(files[name])}


def resized(edit: Callable[[bytes], bytes]) -> Package:
    """Return a package whose owner signed the edited file's size, as nobody should."""
    return whole(entry={"size": len(edit(next(iter(tampered(lambda raw: raw).values()))))})


def sizes() -> Iterator[Recipe]:
    edits: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("cut-to-nothing", lambda raw: b""),
        ("cut-in-header", lambda raw: raw[:63]),
        ("cut-mid-chunk", lambda raw: raw[:-5]),
        ("last-chunk-dropped", lambda raw: raw[:-16]),
        ("byte-appended", lambda raw: raw + b"\0"),
        ("chunk-appended", lambda raw: raw + raw[-16:]),
    ]
    for name, edit in edits:
        yield name, vector("size-wrong", "the manifest says otherwise", tampered(edit))


def headers() -> Iterator[Recipe]:
    fields: list[tuple[str, str, str, Json]] = [
        ("magic", "not-sealed", "one letter", {"magic": b"SLDWU\x01"}),
        ("version-2", "format-unsupported", "a later one", {"magic": b"SLDWT\x02"}),
        ("suite-0", "suite-unsupported", "none", {"suite": 0}),
        ("suite-2", "suite-unsupported", "an unknown one", {"suite": 2}),
        ("log2-chunk-0", "chunk-size-unsupported", "one byte", {"log2_chunk": 0}),
        ("log2-chunk-63", "chunk-size-unsupported", "8 EiB", {"log2_chunk": 63}),
        ("log2-chunk-16", "chunk-size-unsupported", "not one of the two", {"log2_chunk": 16}),
        ("segments-0", "header-out-of-bounds", "none", {"segments": 0}),
        ("segments-most", "header-out-of-bounds", "2^32 - 1", {"segments": 2**32 - 1}),
        ("segments-100002", "header-out-of-bounds", "one too many", {"segments": 100_002, "chunks": 200_000}),
        ("chunks-below-segments", "header-out-of-bounds", "each has one at least", {"chunks": 4}),
        ("chunks-most", "header-out-of-bounds", "2^32 - 1", {"chunks": 2**32 - 1}),
        ("chunks-beyond-file", "header-out-of-bounds", "the index would pass the end", {"chunks": 500_000}),
        ("toc-length-2-63", "header-out-of-bounds", "9 EB", {"toc_length": 2**63}),
        ("toc-length-above-16-mib", "header-out-of-bounds", "by one", {"toc_length": 2**24 + 1}),
        ("toc-length-beyond-file", "header-out-of-bounds", "within 16 MiB", {"toc_length": 2**24}),
        ("toc-length-1", "header-out-of-bounds", "{} has two", {"toc_length": 1}),
        ("kind-0", "header-out-of-bounds", "none", {"kind": 0}),
        ("kind-3", "header-out-of-bounds", "unknown", {"kind": 3}),
        ("kind-blob-of-tensors", "header-out-of-bounds", "a blob has two segments", {"kind": 2}),
        ("reserved", "header-out-of-bounds", "last byte", {"reserved": bytes(6) + b"\1"}),
        ("file-id", "header-mismatch", "another file's", {"file_id": bytes(16)}),
        ("package-id", "header-mismatch", "another package's", {"package_id": bytes(16)}),
    ]
    for name, outcome, comment, wrong in fields:
        yield f"header-{name}", vector(outcome, comment, whole(header=wrong))
    blob = Package([config_file(entry={"kind": "tensors"})])
    yield "header-kind-not-the-manifests", vector("header-mismatch", "a blob listed as tensors", blob)
    flipped = tampered(lambda raw: raw[:63] + b"\1" + raw[64:])
    yield "header-bit", vector("header-out-of-bounds", "after signing", flipped)
    segments = tampered(lambda raw: raw[:40] + b"\x04" + raw[41:])
    yield "header-segments-edited", vector("index-wrong", "within bounds, after signing", segments)
    yield "index-bit", vector("index-wrong", "one bit", tampered(lambda raw: raw[:64] + flip(raw[64:])))


def flip(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 1]) + raw[1:]


def swapped(raw: bytes, one: int, other: int, length: int) -> bytes:
    first, second = raw[one : one + length], raw[other : other + length]
    out = bytearray(raw)
    out[one : one + length], out[other : other + length] = second, first
    return bytes(out)


def chunks() -> Iterator[Recipe]:
    yield (
        "chunk-bit",
        vector("chunk-wrong", "first of a tensor", tampered(lambda raw: raw[:FIRST] + flip(raw[FIRST:]))),
    )
    yield (
        "chunk-tag-bit",
        vector("chunk-wrong", "last of all", tampered(lambda raw: raw[:-1] + flip(raw[-1:]))),
    )
    yield (
        "chunk-bit-in-table",
        vector("chunk-wrong", "segment 0", tampered(lambda raw: raw[:BODY] + flip(raw[BODY:]))),
    )
    within = tampered(lambda raw: swapped(raw, FIRST, FIRST + STEP, STEP))
    yield "chunks-swapped-in-tensor", vector("chunk-wrong", "unsigned", within)
    with_index = tampered(lambda raw: swapped(swapped(raw, FIRST, FIRST + STEP, STEP), 64 + 32, 64 + 64, 32))
    yield "chunks-swapped-with-index", vector("index-wrong", "and their digests", with_index)
    yield from forged_with_the_key()
    signed = whole(chunks=lambda chunks: [chunks[0], chunks[2], chunks[1], *chunks[3:]])
    yield "chunks-swapped-signed", vector("chunk-wrong", "GCM alone refuses what its owner signed", signed)
    forged = whole(chunks=lambda chunks: [*chunks[:5], flip(chunks[5]), chunks[6]])
    yield "chunk-forged-signed", vector("chunk-wrong", "GCM alone refuses what its owner signed", forged)

    def two(swap: bool) -> Package:
        """Return two tensors of one chunk each; they may change places."""
        data = [DATA_ONE, DATA_TWO]
        table = {
            name: {"dtype": "U8", "shape": [64], "data_offsets": [64 * place, 64 * place + 64]}
            for place, name in enumerate("ab")
        }
        order = (lambda c: [c[0], c[2], c[1]]) if swap else (lambda c: c)
        return Package([Forged("model.safetensors", [canonical(table), *data], chunks=order)])

    yield "opened-two-tensors", vector("opened", "what the next ones change", two(swap=False))
    yield "chunks-swapped-between-tensors", vector("chunk-wrong", "signed, of one length", two(swap=True))
    yield from moved_chunks()
    for name, lengths in (("longer", {1: len(EMBED) + 1}), ("shorter", {1: len(EMBED) - 1})):
        package = whole(lengths=lengths)
        yield f"segment-length-bound-{name}", vector("chunk-wrong", "the associated data has it", package)


def forged_with_the_key() -> Iterator[Recipe]:
    """What a customer who holds the data key can do: GCM is symmetric, so these chunks decrypt."""
    other = model_file()
    other.segments[1] = bytes(len(EMBED))
    good, forged = (next(iter(Package([each]).files().values())) for each in (model_file(), other))
    chunk = slice(FIRST, FIRST + STEP)
    assert len(good) == len(forged) and good[:64] == forged[:64] and good[chunk] != forged[chunk]
    moved = tampered(lambda raw: raw[:FIRST] + forged[chunk] + raw[FIRST + STEP :])
    yield "chunk-forged-with-the-key", vector("chunk-wrong", "the index is the owner's", moved)
    yield "file-forged-with-the-key", vector("index-wrong", "its index too", tampered(lambda _: forged))


DATA_ONE, DATA_TWO = DATA(64), DATA(64)


def moved_chunks() -> Iterator[Recipe]:
    """Chunks from another file and from another package under the same data key, signed by their owner."""

    def pair(name: str, swap: bool) -> Files:
        files = [Forged(each, [b"", data], "blob") for each, data in (("a", DATA_ONE), ("b", DATA_TWO))]
        if swap:
            stolen = [chunk_of(files[1], name), chunk_of(files[0], name)]
            for each, chunk in zip(files, stolen, strict=True):
                each.chunks = lambda chunks, chunk=chunk: [chunks[0], chunk]
        return Package(files, name=name).files()

    good = vector(
        "opened",
        "two blobs of one length",
        Package(
            [Forged(each, [b"", data], "blob") for each, data in (("a", DATA_ONE), ("b", DATA_TWO))],
            name="pair",
        ),
    )
    yield "opened-two-blobs", good
    yield "chunks-swapped-between-files", vector("chunk-wrong", "signed", pair("pair", swap=True))
    one = Forged("a", [b"", DATA_ONE], "blob")
    stolen = chunk_of(one, "another package")
    moved = dataclasses.replace(one, chunks=lambda chunks: [chunks[0], stolen])
    yield (
        "chunk-from-another-package",
        vector("chunk-wrong", "same data key, file id and place", Package([moved])),
    )
    whole_file = Package([one], name="another package").files()
    name = next(name for name in whole_file if name.endswith(".sealed"))
    foreign = Package([one]).files() | {name: whole_file[name]}
    yield "file-from-another-package", vector("header-mismatch", "same data key and file id", foreign)


def chunk_of(forged: Forged, package_name: str) -> bytes:
    """Return the second chunk of a file as it is in that package."""
    caught: list[bytes] = []
    watched = dataclasses.replace(forged, chunks=lambda chunks: caught.extend(chunks) or chunks)
    Package([watched], name=package_name).files()
    return caught[1]


ONE: Json = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def table(name: str, comment: str, toc: object, *data: bytes, outcome: str = "toc-malformed") -> Recipe:
    """Return a package of one file with this table of contents, sealed and signed by its owner."""
    raw = toc if isinstance(toc, bytes) else canonical(toc)
    package = Package([Forged("a.safetensors", [raw, *(data or (b"four",))])])
    return f"toc-{name}", vector(outcome, comment, package)


def tables() -> Iterator[Recipe]:
    """Tables of contents that their owner sealed and signed, and that break 5.5 all the same."""
    one = ONE

    yield table("not-json", "a comma too many", b'{"a":1,}')
    yield table("not-utf8", "a lone byte", b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}')
    yield table("array", "not an object", b"[[],[]]")
    yield table("space-before", "begins with {", b" " + canonical({"a": one}))
    yield table("line-end-after", "spaces only", canonical({"a": one}) + b"\n")
    yield table("spaces-after", "padding is part of it", canonical({"a": one}) + b"   ", outcome="opened")
    yield table("two-documents", "the second unread", canonical({"a": one}) + b"{}")
    twice = canonical({"a": one})[:-1] + b"," + canonical({"a": one})[1:]
    yield table("tensor-twice", "the same name", twice, b"four", b"")
    yield table(
        "key-twice", "shape", canonical({"a": one}).replace(b'"shape":[4]', b'"shape":[4],"shape":[4]')
    )
    twice = canonical({"a": one}).replace(b'"dtype":"U8"', b'"dtype":"U8","dtype":"U8"')
    yield table("dtype-twice", "the same value", twice)
    twice = canonical({"a": one, "__metadata__": {"k": "v"}}).replace(b'"k":"v"', b'"k":"v","k":"v"')
    yield table("metadata-key-twice", "the same value", twice)
    yield table("tensors-missing", "one segment more", {"a": one}, b"four", b"more", outcome="toc-malformed")
    yield table("tensors-too-many", "one segment less", {"a": one, "b": one | {"data_offsets": [4, 8]}})
    yield table("metadata", "strings to strings", {"a": one, "__metadata__": {"k": "v"}}, outcome="opened")
    yield table("metadata-number", "not a string", {"a": one, "__metadata__": {"k": 1}})
    many = {str(number): "" for number in range(1025)}
    yield table("metadata-1025", "1,024 at most", {"a": one, "__metadata__": many})
    del many["0"]
    yield table("metadata-1024", "1,024 at most", {"a": one, "__metadata__": many}, outcome="opened")
    yield table("metadata-list", "not an object", {"a": one, "__metadata__": []})
    yield table("deep", "100,000 brackets", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def entries() -> Iterator[Recipe]:
    """Tables whose entries break 5.5."""
    one = ONE
    wrong: list[tuple[str, str, object]] = [
        ("entry-list", "not an object", []),
        ("entry-missing", "no shape", {"dtype": "U8", "data_offsets": [0, 4]}),
        ("entry-unknown", "a fourth key", one | {"note": ""}),
        ("dtype-unknown", "U4", one | {"dtype": "U4"}),
        ("dtype-number", "8", one | {"dtype": 8}),
        ("shape-product", "three of four", one | {"shape": [3]}),
        ("shape-negative", "-4 * -1", one | {"shape": [-4, -1]}),
        ("shape-float", "4.0", one | {"shape": [4.0]}),
        ("shape-bool", "true", one | {"shape": [4, True]}),
        ("shape-string", "'4'", one | {"shape": ["4"]}),
        ("shape-17-dimensions", "16 at most", one | {"shape": [4] + [1] * 16}),
        ("shape-overflow", "2^32 * 2^32 * 4", one | {"shape": [2**32, 2**32, 4]}),
        ("shape-empty-but-huge", "0 * 2^41", {"dtype": "U8", "shape": [0, 2**41], "data_offsets": [0, 0]}),
        (
            "shape-empty-but-huge-product",
            "0 * 2^40 * 2^40",
            {"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]},
        ),
        ("offsets-three", "a pair", one | {"data_offsets": [0, 4, 4]}),
        ("offsets-turned", "end before begin", one | {"data_offsets": [4, 0]}),
        ("offsets-hole", "begins at 1", one | {"data_offsets": [1, 5]}),
        ("half-a-byte", "F4 of 7", {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}),
    ]
    for name, comment, entry in wrong:
        yield table(name, comment, {"a": entry})
    overlap = {"a": one, "b": one | {"data_offsets": [2, 6]}}
    yield table("overlap", "two bytes in both", overlap, b"four", b"four")
    for name, odd in (("slash", "a/b"), ("dots", "a..b"), ("nul", "a\0b"), ("empty", ""), ("long", "a" * 513),
                      ("surrogate", "\ud800"), ("delete", "\x7f")):  # fmt: skip
        yield table(f"name-{name}", "a tensor's name", {odd: one})
    yield table(
        "length-edited", "a segment shorter than its entry", {"a": one}, b"fou", outcome="geometry-wrong"
    )
    yield table(
        "length-edited-up", "a segment longer than its entry", {"a": one}, b"fours", outcome="geometry-wrong"
    )
    blob = Forged("a", [b"", b"x"], "blob", header={"chunks": 3}, chunks=lambda chunks: [*chunks, bytes(16)])
    yield "blob-empty-chunk-added", vector("geometry-wrong", "signed", Package([blob]))


def keys() -> Iterator[Recipe]:
    yield "key-wrong", vector("key-wrong", "another 32 bytes", small(), data_key=secret("other"))
    yield "key-31-bytes", vector("key-wrong", "too short", small(), data_key=secret("data")[:31])
    customer = small(owner="customer", name="adapter", data_key=secret("customer data"))
    yield "key-of-vendor-on-adapter", vector("key-wrong", "the other party's", customer, owner="customer")
    yield (
        "key-of-customer-on-base",
        vector("key-wrong", "the other party's", small(), data_key=secret("customer data")),
    )
    committed = Package([config_file(data_key=secret("other"))])
    yield "key-committed-but-not-used", vector("chunk-wrong", "sealed under another", committed)


def edited(edit: Callable[[Json, Json], list[Json]]) -> Package:
    """Return a package whose recipients are what `edit` makes of a good entry and the manifest."""

    def replace(manifest: Json) -> Json:
        return manifest | {"recipients": edit(wrap("installation", manifest, secret("data")), manifest)}

    return small(edit=replace)


def wrapped() -> Iterator[Recipe]:
    unwrapping = {"data_key": None, "recipient_key": secret("installation")}
    stranger = small(recipients=["another installation"])
    yield "recipient-not-listed", vector("recipient-missing", "somebody else's", stranger, **unwrapping)
    yield "recipient-none", vector("recipient-missing", "an empty list", small(), **unwrapping)
    bit = edited(
        lambda entry, _: [
            entry | {"ciphertext": ("1" if entry["ciphertext"][0] == "0" else "0") + entry["ciphertext"][1:]}
        ]
    )
    yield "recipient-bit", vector("recipient-wrong", "of the ciphertext", bit, **unwrapping)
    low = edited(lambda entry, _: [entry | {"encapsulated": "00" * 32}])
    yield "recipient-low-order", vector("recipient-wrong", "a shared secret of zero", low, **unwrapping)
    other_id = edited(
        lambda _, manifest: [wrap("installation", manifest | {"package_id": "00" * 16}, secret("data"))]
    )
    yield (
        "recipient-of-another-package",
        vector("recipient-wrong", "the context has the id", other_id, **unwrapping),
    )
    other_owner = edited(
        lambda _, manifest: [wrap("installation", manifest | {"owner": "customer"}, secret("data"))]
    )
    yield (
        "recipient-of-another-owner",
        vector("recipient-wrong", "the context has the owner", other_owner, **unwrapping),
    )
    other_key = edited(lambda _, manifest: [wrap("installation", manifest, secret("other"))])
    yield (
        "recipient-holds-another-key",
        vector("key-wrong", "it unwraps, the commitment differs", other_key, **unwrapping),
    )
    malformed: list[tuple[str, str, Callable[[Json, Json], list[Json]]]] = [
        ("twice", "one pair of scheme and id", lambda entry, _: [entry, entry]),
        ("scheme-unknown", "rot13", lambda entry, _: [entry | {"scheme": "rot13"}]),
        ("ciphertext-47-bytes", "48", lambda entry, _: [entry | {"ciphertext": entry["ciphertext"][2:]}]),
        ("encapsulated-missing", "32", lambda entry, _: [entry | {"encapsulated": ""}]),
        ("upper-case", "lower-case hex", lambda entry, _: [entry | {"ciphertext": "AB" * 48}]),
        (
            "half-a-byte",
            "pairs of digits",
            lambda entry, _: [entry | {"ciphertext": entry["ciphertext"][1:]}],
        ),
        ("field-unknown", "alg", lambda entry, _: [entry | {"alg": "none"}]),
        ("kms-empty", "1 to 6,144 bytes", lambda entry, _: [kms(entry, 0)]),
        ("kms-large", "1 to 6,144 bytes", lambda entry, _: [kms(entry, 6145)]),
        ("kms-encapsulated", "none", lambda entry, _: [kms(entry, 48) | {"encapsulated": "00" * 32}]),
        ("unsorted", "by scheme, then id", lambda entry, _: [entry, kms(entry, 48)]),
        ("65", "64 at most", lambda entry, _: [kms(entry, 1) | {"key_id": f"{n:032x}"} for n in range(65)]),
    ]
    for name, comment, edit in malformed:
        yield f"recipient-{name}", vector("manifest-malformed", comment, edited(edit), **unwrapping)
    largest = edited(lambda entry, _: [kms(entry, 6144), entry])
    yield "opened-recipient-kms-beside", opened(largest, unwrapping)


def opened(package: Package, given: Json) -> object:
    return vector("opened", "an entry of another scheme beside", package, **given)


def kms(entry: Json, length: int) -> Json:
    return entry | {"ciphertext": "ab" * length, "encapsulated": "", "scheme": "kms"}


def recipes() -> Iterator[Recipe]:
    for each in (sizes, headers, chunks, tables, entries, keys, wrapped):
        yield from each()
