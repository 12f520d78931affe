"""The OpenSSF model-signing bundle: made, checked, tampered with, and as that project's own tool makes it.

The samples lie in `oms/`: `ours` was made here and verified by model-signing 1.1.1, `theirs` was made by it.
`scripts/check-signing` does both again with that tool, in an environment of its own: it brings sigstore,
36 packages in all, which neither the product nor its tests use otherwise.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_package import oms, sealer
from model_package.beside import Documents
from tests.model_package import making
from tests.model_package.oms_interop import PRIVATE, SAMPLES

FILES = {"a.sealed": "aa" * 32, "folder/b.sealed": "bb" * 32}


def private() -> bytearray:
    return bytearray(PRIVATE)


def bundle(**changed: Callable[[Any], None]) -> bytes:
    """Return a bundle whose JSON, or whose statement signed anew, is changed."""
    made = json.loads(oms.sign(private(), "tiny", FILES))
    if "statement" in changed:
        statement = json.loads(base64.b64decode(made["dsseEnvelope"]["payload"]))
        changed["statement"](statement)
        payload = json.dumps(statement).encode()
        key = oms._private_key(private())
        signed = key.sign(oms._encoded(payload), oms.ec.ECDSA(oms.hashes.SHA256()))
        made["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        made["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signed).decode()
    if "outer" in changed:
        changed["outer"](made)
    return json.dumps(made).encode()


def test_what_was_signed_is_read_back_and_signing_again_gives_the_same_bytes() -> None:
    made = oms.sign(private(), "tiny", FILES)
    assert oms.verify(made, oms.public_pem(private())) == FILES
    assert oms.sign(private(), "tiny", FILES) == made
    assert oms.verify(bundle(statement=lambda _: None), oms.public_pem(private())) == FILES


@pytest.mark.parametrize("sample", ["ours", "theirs"])
def test_a_sample_holds_and_any_changed_added_missing_or_linked_file_is_seen(
    sample: str, tmp_path: Path
) -> None:
    shutil.copytree(SAMPLES / sample, tmp_path / "model")
    model, pem = tmp_path / "model", oms.public_pem(private())
    signed = (model / oms.NAME).read_bytes()
    oms.check(model, signed, pem)
    (model / "more").write_bytes(b"")
    with pytest.raises(oms.OmsFilesDiffer):
        oms.check(model, signed, pem)
    oms.check(model, signed, pem, (oms.NAME, "more"))
    (model / "more").unlink()
    one = model / "weights.sealed"
    content = one.read_bytes()
    one.write_bytes(content[:-1] + b"?")
    with pytest.raises(oms.OmsFilesDiffer):
        oms.check(model, signed, pem)
    one.unlink()
    with pytest.raises(oms.OmsFilesDiffer):
        oms.check(model, signed, pem)
    (tmp_path / "elsewhere").write_bytes(content)
    one.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(oms.OmsFilesDiffer):
        oms.check(model, signed, pem)


def test_our_sample_is_what_signing_gives_today() -> None:
    """So what that project's tool verified once, it verifies still."""
    folder = SAMPLES / "ours"
    signed = (folder / oms.NAME).read_bytes()
    files = oms.verify(signed, oms.public_pem(private()))
    assert oms.sign(private(), folder.name, files) == signed


@pytest.mark.parametrize("sample", ["ours", "theirs"])
def test_no_flipped_bit_of_a_bundle_changes_what_is_believed(sample: str) -> None:
    raw = (SAMPLES / sample / oms.NAME).read_bytes()
    pem, good = oms.public_pem(private()), None
    good = oms.verify(raw, pem)
    refused = 0
    for place in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        try:
            assert oms.verify(bytes(changed), pem) == good
        except oms.OmsError:
            refused += 1
    assert refused > len(raw) // 3 * 0.8  # the rest fell on fields that say nothing


def test_another_key_is_refused_whether_the_hint_names_it_or_not() -> None:
    other = oms.public_pem(bytearray(31) + b"\5")
    with pytest.raises(oms.OmsSignatureRefused):
        oms.verify(bundle(), other)

    def unhinted(made: Any) -> None:
        del made["verificationMaterial"]["publicKey"]["hint"]

    assert oms.verify(bundle(outer=unhinted), oms.public_pem(private())) == FILES
    with pytest.raises(oms.OmsSignatureRefused):
        oms.verify(bundle(outer=unhinted), other)


OUTER: dict[str, Callable[[Any], None]] = {
    "another type of bundle": lambda made: made.update(mediaType="application/json"),
    "another type of payload": lambda made: made["dsseEnvelope"].update(payloadType="text/plain"),
    "two signatures": lambda made: made["dsseEnvelope"]["signatures"].append({"sig": "", "keyid": ""}),
    "no signature": lambda made: made["dsseEnvelope"].update(signatures=[]),
    "no base64": lambda made: made["dsseEnvelope"].update(payload="?"),
    "a certificate in the key's place": lambda made: made.update(verificationMaterial={"certificate": {}}),
}
STATEMENT: dict[str, Callable[[Any], None]] = {
    "another type of statement": lambda said: said.update(_type="x"),
    "another predicate": lambda said: said.update(predicateType="x"),
    "a digest of something else": lambda said: said["subject"][0]["digest"].update(sha256="00" * 32),
    "no subject": lambda said: said.update(subject=[]),
    "pieces of files": lambda said: said["predicate"]["serialization"].update(method="shards"),
    "another hash": lambda said: said["predicate"]["resources"][0].update(algorithm="blake3"),
    "no hex": lambda said: said["predicate"]["resources"][0].update(digest="zz"),
    "a file twice": lambda said: said["predicate"]["resources"][1].update(name="a.sealed"),
}


@pytest.mark.parametrize("fault", OUTER)
def test_an_envelope_of_another_form_is_refused(fault: str) -> None:
    with pytest.raises(oms.OmsMalformed):
        oms.verify(bundle(outer=OUTER[fault]), oms.public_pem(private()))


@pytest.mark.parametrize("fault", STATEMENT)
def test_a_statement_of_another_form_is_refused_though_its_signature_holds(fault: str) -> None:
    with pytest.raises(oms.OmsMalformed):
        oms.verify(bundle(statement=STATEMENT[fault]), oms.public_pem(private()))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[" * 100_000, b"\xff", b" " * (oms.MAX_BUNDLE_BYTES + 1)])
def test_hostile_bytes_are_malformed(raw: bytes) -> None:
    with pytest.raises(oms.OmsMalformed):
        oms.verify(raw, oms.public_pem(private()))


def test_keys_that_are_none_are_refused() -> None:
    for scalar in (bytearray(32), bytearray(b"\xff" * 32), bytearray(31)):
        with pytest.raises(oms.OmsKeyRefused):
            oms.public_pem(scalar)
    p384 = oms.ec.generate_private_key(oms.ec.SECP384R1()).public_key()
    for pem in (b"", oms._pem(p384)):
        with pytest.raises(oms.OmsKeyRefused):
            oms.verify(bundle(), pem)
    fresh = oms.make_private()
    assert len(fresh) == 32 and oms.verify(oms.sign(fresh, "m", {}), oms.public_pem(fresh)) == {}


def test_a_sealed_package_is_signed_whole(tmp_path: Path) -> None:
    told = sealer.Sealing(
        making.Owner.VENDOR,
        sealer.Model("tiny", "1.0"),
        making.CREATED_S,
        documents=Documents({"LICENSE": b"text"}, oms_key=private()),
    )
    files = sealer.files_of(making.model(tmp_path / "plain"))
    path = tmp_path / "package"
    sealer.seal(files, path, told, making.key("data"), lambda _c, _k: [], making.key("vendor"))
    signed, pem = (path / oms.NAME).read_bytes(), oms.public_pem(private())
    oms.check(path, signed, pem)
    assert set(oms.verify(signed, pem)) == {each.name for each in path.iterdir()} - {oms.NAME}
    (path / "LICENSE").write_bytes(b"another")
    with pytest.raises(oms.OmsFilesDiffer):
        oms.check(path, signed, pem)
