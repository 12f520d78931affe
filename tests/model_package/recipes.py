"""The vectors of FORMAT.md 2, 3, 4 and 8.1 to 8.3: files, signature, manifest, what a reader compares.

Owns: one recipe per vector, each with one thing wrong. Must not know: model_package.
Invariant: a recipe's name is the fault; nothing is random.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.model_package.forge import (
    CHUNK,
    Files,
    Forged,
    Json,
    Package,
    canonical,
    content_sha256,
    public_of,
    secret,
    sign,
)
from tests.model_package.vector_file import NOW_S, Vector

ROOTS: list[tuple[str, str, int | None]] = [
    ("vendor", public_of(secret("vendor")).hex(), None),
    ("customer", public_of(secret("customer")).hex(), None),
]
DATA = random.Random(20261123).randbytes
EMBED, LAYER = DATA(2 * CHUNK + 300), DATA(256)
MODEL = {
    "embed": {"dtype": "U8", "shape": [len(EMBED)], "data_offsets": [0, len(EMBED)]},
    "layer": {"dtype": "F32", "shape": [8, 8], "data_offsets": [len(EMBED), len(EMBED) + 256]},
    "scale": {"dtype": "BF16", "shape": [], "data_offsets": [len(EMBED) + 256, len(EMBED) + 258]},
    "unused": {"dtype": "F32", "shape": [0], "data_offsets": [len(EMBED) + 258, len(EMBED) + 258]},
}
CONFIG = b'{"model_type":"llama"}'

Recipe = tuple[str, Vector]


def model_file(**wrong: Any) -> Forged:
    return Forged("model.safetensors", [canonical(MODEL), EMBED, LAYER, b"\x80\x3f", b""], **wrong)


def config_file(**wrong: Any) -> Forged:
    return Forged("config.json", [b"", CONFIG], "blob", **wrong)


def small(**wrong: Any) -> Package:
    """Return a package of one small file, for what does not touch sealed files."""
    return Package([config_file()], **wrong)


def content_of(package: Package) -> dict[str, str]:
    """Return what unsealing gives: FORMAT.md 5.6."""
    found = {}
    for each in package.forged:
        head = len(each.segments[0]).to_bytes(8, "little") if each.kind == "tensors" else b""
        found[each.name] = hashlib.sha256(head + b"".join(each.segments)).hexdigest()
    return found


def vector(outcome: str, comment: str, package: Package | Files, **given: Any) -> Vector:
    files = package.files() if isinstance(package, Package) else package
    given = {"roots": ROOTS, "data_key": secret("data")} | given
    if outcome == "opened" and isinstance(package, Package):
        given["content"] = content_of(package)
    return Vector(outcome, comment, files, **given)


def opening() -> Iterator[Recipe]:
    whole = Package([config_file(), model_file()])
    yield "opened", vector("opened", "a base package with a blob and four tensors", whole)
    yield "opened-no-tensors", vector("opened", "{} is a table", Package([Forged("a.safetensors", [b"{}"])]))
    blob = Package([Forged("empty", [b"", b""], "blob")])
    yield "opened-empty-blob", vector("opened", "an empty segment is one chunk of no bytes", blob)
    full = Package([Forged("full", [b"", DATA(2 * CHUNK)], "blob")])
    yield "opened-full-chunks", vector("opened", "no empty chunk follows a full last one", full)
    names = ["a.b/c_d/E-f/0", "a.b/c_e", "g"]
    folders = Package([Forged(name, [b"", name.encode()], "blob") for name in names])
    yield "opened-folders", vector("opened", "names of up to four parts", folders)
    wrapped = small(recipients=["installation", "another installation"])
    keys = {"data_key": None, "recipient_key": secret("installation")}
    yield "opened-recipient", vector("opened", "the data key is unwrapped", wrapped, **keys)
    epoch = vector("opened", "the floor is inclusive", small(), min_epoch=5)
    yield "opened-epoch-at-floor", epoch
    until = [("vendor", ROOTS[0][1], NOW_S)]
    yield "opened-signer-in-last-second", vector("opened", "not_after_s is inclusive", small(), roots=until)
    clock = vector("opened", "an hour of tolerance", small(), now_s=1_790_000_000 - 3600)
    yield "opened-clock-an-hour-behind", clock
    base, _ = small().manifest()
    bound = {"content_sha256": content_sha256(base), "package_id": base["package_id"]}
    adapter = small(name="adapter", owner="customer", fields={"base": bound})
    given = {"owner": "customer", "base": (bound["package_id"], bound["content_sha256"])}
    yield "opened-adapter", vector("opened", "a customer's adapter on its base", adapter, **given)
    yield (
        "adapter-of-another-base",
        vector(
            "base-wrong",
            "the same package id, another content",
            adapter,
            owner="customer",
            base=(bound["package_id"], "0" * 64),
        ),
    )
    yield (
        "adapter-without-base",
        vector("base-wrong", "opened as if it needed none", adapter, owner="customer"),
    )
    yield (
        "base-opened-as-adapter",
        vector(
            "base-wrong",
            "a customer's package without base, where one is expected",
            small(owner="customer"),
            **given,
        ),
    )


def files() -> Iterator[Recipe]:
    good = small().files()
    sealed_name = next(name for name in good if name.endswith(".sealed"))

    def without(name: str) -> Files:
        return {each: content for each, content in good.items() if each != name}

    for name, outcome in (
        ("manifest.json", "manifest-missing"),
        ("manifest.sig", "signature-missing"),
        (sealed_name, "file-missing"),
    ):
        short = name if name.startswith("manifest") else "sealed-file"
        yield f"{short.replace('.', '-')}-removed", vector(outcome, "not there", without(name))
        moved = without(name) | {"elsewhere": good[name]}
        yield (
            f"{short.replace('.', '-')}-is-a-link",
            vector("not-a-regular-file", "a link to the right bytes", moved, links={name: "elsewhere"}),
        )
        yield (
            f"{short.replace('.', '-')}-is-a-folder",
            vector("not-a-regular-file", "a folder in its place", without(name), folders=[name]),
        )
    yield "manifest-empty", vector("manifest-oversized", "no bytes", good | {"manifest.json": b""})
    plain = without(sealed_name) | {sealed_name: CONFIG.ljust(len(good[sealed_name]))}
    yield "plain-file-in-place", vector("not-sealed", "the right name and size, no magic", plain)
    beside = good | {"config.json": b'{"model_type":"other"}'}
    opened = vector("opened", "a plain file beside is not looked at", beside)
    opened.content = content_of(small())
    yield "opened-plain-file-beside", opened


def signatures() -> Iterator[Recipe]:
    good = small().files()
    raw, sig = good["manifest.json"], good["manifest.sig"]

    def signed(content: bytes) -> Files:
        return good | {"manifest.sig": content}

    yield "signature-87-bytes", vector("signature-malformed", "one byte short", signed(sig[:-1]))
    yield "signature-89-bytes", vector("signature-malformed", "one byte long", signed(sig + b"\0"))
    yield "signature-magic", vector("signature-malformed", "version 2", signed(sig[:6] + b"\x02" + sig[7:]))
    yield "signature-bit", vector("signature-wrong", "last bit", signed(sig[:-1] + bytes([sig[-1] ^ 1])))
    stranger = sign(raw, secret("stranger"))
    yield "signer-stranger", vector("signer-unknown", "a good signature, no root", signed(stranger))
    posing = sig[:24] + stranger[24:]
    yield "signer-posing", vector("signature-wrong", "a stranger's, under the vendor's id", signed(posing))
    customer = sign(raw, secret("customer"))
    yield "signer-customer-on-vendor-package", vector("signer-of-other-party", "5", signed(customer))
    yield (
        "signer-vendor-on-adapter",
        vector(
            "signer-of-other-party",
            "a vendor's signature where a customer's is expected",
            small(owner="customer", signer=secret("vendor")),
            owner="customer",
        ),
    )
    expired: list[tuple[str, str, int | None]] = [("vendor", ROOTS[0][1], NOW_S - 1)]
    yield "signer-expired", vector("signer-expired", "a second too late", small(), roots=expired)
    spaced = json.dumps(json.loads(raw), sort_keys=True).encode()
    yield "manifest-respaced", vector("signature-wrong", "bytes are signed", good | {"manifest.json": spaced})
    turned = json.dumps(dict(reversed(json.loads(raw).items())), separators=(",", ":")).encode()
    yield (
        "manifest-reordered",
        vector("signature-wrong", "bytes are signed", good | {"manifest.json": turned}),
    )
    older = raw.replace(b'"epoch":5', b'"epoch":6')
    yield "manifest-edited", vector("signature-wrong", "one digit", good | {"manifest.json": older})
    yield (
        "manifest-not-json-unsigned",
        vector(
            "signature-wrong", "nothing is parsed before the signature holds", good | {"manifest.json": b"{{"}
        ),
    )


def encodings() -> Iterator[Recipe]:
    """Manifests that their owner signed, and that break 4.1 or 4.2 all the same."""

    def text(edit: Callable[[bytes], bytes]) -> Package:
        return small(encode=lambda manifest: edit(canonical(manifest)))

    def wrong(name: str, comment: str, package: Package) -> Recipe:
        return f"manifest-{name}", vector("manifest-malformed", comment, package)

    yield wrong("signed-not-json", "an open brace", text(lambda raw: raw[:-1]))
    yield wrong("space", "after a colon", text(lambda raw: raw.replace(b":", b": ", 1)))
    yield wrong("line-end", "after the last brace", text(lambda raw: raw + b"\n"))
    yield wrong("byte-order-mark", "before the first brace", text(lambda raw: b"\xef\xbb\xbf" + raw))
    yield wrong(
        "unsorted",
        "keys in another order",
        small(encode=lambda m: json.dumps(dict(reversed(m.items())), separators=(",", ":")).encode()),
    )
    yield wrong(
        "key-twice",
        "epoch, the same value",
        text(lambda raw: raw.replace(b'"epoch":5', b'"epoch":5,"epoch":5')),
    )
    yield wrong("float", "5.0", text(lambda raw: raw.replace(b'"epoch":5', b'"epoch":5.0')))
    yield wrong("exponent", "5e0", text(lambda raw: raw.replace(b'"epoch":5', b'"epoch":5e0')))
    yield wrong("leading-zero", "05", text(lambda raw: raw.replace(b'"epoch":5', b'"epoch":05')))
    yield wrong("minus-zero", "-0", text(lambda raw: raw.replace(b'"epoch":5', b'"epoch":-0')))
    yield wrong("escape", r"tiny as tin\u0079", text(lambda raw: raw.replace(b"tiny", rb"tin\u0079")))
    yield wrong("deep", "100,000 brackets", text(lambda raw: b"[" * 100_000))
    yield wrong(
        "number-5000-digits", "epoch", text(lambda raw: raw.replace(b'"epoch":5', b'"epoch":' + b"9" * 5000))
    )
    yield wrong(
        "field-missing", "no epoch", small(edit=lambda m: {k: v for k, v in m.items() if k != "epoch"})
    )
    yield wrong("field-unknown", "alg", small(edit=lambda m: m | {"alg": "none"}))
    yield wrong("field-unknown-in-entry", "path", Package([config_file(entry={"path": "x"})]))


def bounds() -> Iterator[Recipe]:
    """Manifests that their owner signed, each with one value outside 4.2."""

    def wrong(name: str, package: Package) -> Recipe:
        return f"manifest-{name}", vector("manifest-malformed", "a value out of bounds", package)

    values: list[tuple[str, str, object]] = [
        ("epoch", "negative", -1),
        ("epoch", "2-31", 2**31),
        ("epoch", "true", True),
        ("epoch", "string", "5"),
        ("created_s", "above-2-50", 2**50 + 1),
        ("min_loader", "null", None),
        ("owner", "both", "both"),
        ("package_id", "upper-case", "AB" * 16),
        ("package_id", "short", "ab" * 15),
        ("commitment", "short", "ab" * 31),
        ("files", "none", []),
        ("files", "null", None),
        ("recipients", "null", None),
        ("base", "empty", {}),
        ("model", "name-empty", {"name": "", "version": "1"}),
        ("model", "name-space", {"name": "a b", "version": "1"}),
        ("model", "name-long", {"name": "a" * 101, "version": "1"}),
        ("format", "string", "1"),
    ]
    for field, fault, value in values:
        package = small(edit=lambda m, f=field, v=value: m | {f: v})
        yield wrong(f"{field.replace('_', '-')}-{fault}", package)
    for field, value in (
        ("size", 63),
        ("size", 2**38 + 1),
        ("kind", "link"),
        ("sha256", "0"),
        ("file_id", ""),
    ):
        yield wrong(
            f"entry-{field.replace('_', '-')}-{value or 'empty'}",
            Package([config_file(entry={field: value})]),
        )
    two = [Forged("b", [b"", b"b"], "blob"), Forged("a", [b"", b"a"], "blob")]
    yield wrong("files-unsorted", Package(two))
    same = [Forged("a", [b"", b"a"], "blob", "same"), Forged("b", [b"", b"b"], "blob", "same")]
    yield wrong("file-id-twice", Package(same))


def names() -> Iterator[Recipe]:
    def refused(name: str, comment: str, *listed: str) -> Recipe:
        forged = [Forged(each, [b"", b"x"], "blob", str(place)) for place, each in enumerate(listed)]
        return f"name-{name}", vector("name-refused", comment, Package(forged))

    yield refused("climbs", "..", "../config.json")
    yield refused("climbs-inside", "a part that is ..", "a/../b")
    yield refused("absolute", "a path", "/etc/passwd")
    yield refused("empty", "no character", "")
    yield refused("empty-part", "two slashes", "a//b")
    yield refused("folder", "a slash at the end", "a/")
    yield refused("hidden", "a dot in front", ".config")
    yield refused("dot-at-end", "other file systems drop it", "a.")
    yield refused("dot-at-end-of-part", "other file systems drop it", "a./b")
    yield refused("space", "a character not in the list", "a b")
    yield refused("backslash-free-drive", "a colon", "c:a")
    yield refused("five-parts", "four at most", "a/b/c/d/e")
    yield refused("long-part", "101 characters", "a" * 101)
    yield refused("long", "201 characters", "/".join(["a" * 66, "b" * 66, "c" * 67]))
    yield refused("twice", "the same name", "a", "a")
    yield refused("case-clash", "one file where case does not count", "Config.json", "config.json")
    yield refused("file-is-folder", "a and a/b", "a", "a/b")
    yield refused("file-is-folder-case", "A and a/b", "A", "a/b")
    for outcome, char in (
        ("manifest-malformed", "\u00e9"),
        ("manifest-malformed", "\n"),
        ("manifest-malformed", "\\"),
    ):
        package = Package([Forged(f"a{char}b", [b"", b"x"], "blob", "odd")])
        label = {"\u00e9": "not-ascii", "\n": "line-end", "\\": "backslash"}[char]
        yield f"name-{label}", vector(outcome, "strings hold plain ASCII", package)


def comparisons() -> Iterator[Recipe]:
    fields: list[tuple[str, str, Json, Json]] = [
        ("format-2", "format-unsupported", {"format": 2}, {}),
        ("format-0", "format-unsupported", {"format": 0}, {}),
        ("min-loader-2", "loader-too-old", {"min_loader": 2}, {}),
        ("epoch-below-floor", "epoch-too-old", {}, {"min_epoch": 6}),
        ("created-in-the-future", "clock-behind", {}, {"now_s": 1_790_000_000 - 3601}),
    ]
    for name, outcome, wrong, given in fields:
        yield name, vector(outcome, "signed, and compared", small(fields=wrong), **given)
    yield (
        "owner-customer-signed-by-vendor",
        vector(
            "owner-wrong",
            "a customer's package, signed by the vendor",
            small(owner="customer", signer=secret("vendor")),
        ),
    )
    both = [*ROOTS, ("customer", ROOTS[0][1], None)]
    yield (
        "owner-vendor-where-customer-trusts-it",
        vector(
            "owner-wrong",
            "a vendor's package opened as an adapter, its root trusted for both",
            small(),
            owner="customer",
            roots=both,
        ),
    )


def recipes() -> Iterator[Recipe]:
    for each in (opening, files, signatures, encodings, bounds, names, comparisons):
        yield from each()
