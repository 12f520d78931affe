"""The licence's text: one form, every bound, nothing parsed before its signature holds."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from model_package import licence_form, signing_keys
from model_package.licence_form import MAX_FEATURES, MAX_KEYS, MAX_PACKAGES, Licence
from model_package.refusal import KeyRefused, Refusal
from model_package.signature import Root
from tests.model_package.licence_fuzz import run, sample

NOW_S = 1_800_000_000
PRIVATE = signing_keys.make_private()
ROOTS = [Root(signing_keys.public_of(PRIVATE))]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def document(**changed: Any) -> dict[str, Any]:
    """Return the sample as plain values, with terms changed or, where given None, left out."""
    whole: dict[str, Any] = json.loads(canonical(msgspec.to_builtins(sample())))
    whole["terms"].update(changed)
    whole["terms"] = {name: value for name, value in whole["terms"].items() if value is not None}
    return whole


def refusal_of(raw: bytes) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        licence_form.parse(raw)
    assert raised.value.__context__ is None
    return raised.value.refusal


def verification(raw: bytes) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        licence_form.verify(raw, ROOTS, NOW_S)
    return raised.value.refusal


def test_a_licence_survives_its_text() -> None:
    signed = licence_form.sign(sample(), PRIVATE)
    assert licence_form.verify(signed, ROOTS, NOW_S) == sample()
    assert signed.count(b"\n") == 2 and signed.isascii()


def test_the_encoding_is_canonical_json_of_the_fields() -> None:
    assert licence_form.parse(canonical(document())) == sample()


@pytest.mark.parametrize(
    "changed",
    [
        {"customer": None},
        {"customer": ""},
        {"customer": "x" * 201},
        {"customer": "tab\t"},
        {"customer": 'quote"'},
        {"customer": "naïve"},
        {"customer": 7},
        {"epoch_min": -1},
        {"epoch_min": 2**31},
        {"epoch_min": 1.0},
        {"epoch_min": True},
        {"epoch_min": "1"},
        {"features": ["b", "a"]},
        {"features": ["a", "a"]},
        {"features": ["A"]},
        {"features": [""]},
        {"features": "a"},
        {"features": [f"f{n:03}" for n in range(MAX_FEATURES + 1)]},
        {"format": 2},
        {"format": "1"},
        {"id": "a/b"},
        {"id": "x" * 101},
        {"not_after_s": 2**50 + 1},
        {"not_after_s": NOW_S - 1},
        {"not_before_s": NOW_S + 1},
        {"package_ids": []},
        {"package_ids": ["03" * 16]},
        {"package_ids": ["03" * 16, "02" * 16]},
        {"package_ids": ["02" * 16, "02" * 16]},
        {"package_ids": ["02" * 16, "AB" * 16]},
        {"package_ids": ["02" * 16, "03" * 15]},
        {"package_ids": [f"{n:032x}" for n in range(MAX_PACKAGES + 1)]},
        {"extra": 1},
    ],
)
def test_terms_outside_their_bounds_are_malformed(changed: dict[str, Any]) -> None:
    assert refusal_of(canonical(document(**changed))) is Refusal.LICENCE_MALFORMED


def with_key(**changed: Any) -> bytes:
    whole = document()
    whole["keys"][0].update(changed)
    return canonical(whole)


@pytest.mark.parametrize(
    "changed",
    [
        {"ciphertext": "ab" * 47},
        {"ciphertext": "AB" * 48},
        {"encapsulated": "cd" * 33},
        {"key_id": "01" * 15},
        {"package_id": "04" * 16},
        {"scheme": "x25519"},
    ],
)
def test_a_wrapped_key_outside_its_bounds_is_malformed(changed: dict[str, Any]) -> None:
    assert licence_form.parse(with_key(ciphertext="00" * 48)).keys[0].ciphertext == "00" * 48
    assert refusal_of(with_key(**changed)) is Refusal.LICENCE_MALFORMED


def test_as_many_keys_as_allowed_fit_the_largest_file_and_one_more_is_malformed() -> None:
    def keys(count: int) -> Licence:
        made = [msgspec.structs.replace(sample().keys[0], key_id=f"{number:032x}") for number in range(count)]
        return msgspec.structs.replace(sample(), keys=tuple(made))

    full = licence_form.sign(keys(MAX_KEYS), PRIVATE)
    assert len(full) <= licence_form.MAX_LICENCE_BYTES
    assert len(licence_form.verify(full, ROOTS, NOW_S).keys) == MAX_KEYS
    with pytest.raises(KeyRefused):
        licence_form.sign(keys(MAX_KEYS + 1), PRIVATE)


def test_keys_twice_or_out_of_order_are_malformed() -> None:
    whole = document()
    whole["keys"] = whole["keys"] * 2
    assert refusal_of(canonical(whole)) is Refusal.LICENCE_MALFORMED
    whole["keys"] = [{**whole["keys"][0], "key_id": digit * 32} for digit in "21"]
    assert refusal_of(canonical(whole)) is Refusal.LICENCE_MALFORMED


@pytest.mark.parametrize(
    "spelling",
    [
        lambda body: body.replace(b",", b", ", 1),
        lambda body: body + b" ",
        lambda body: body + b"\n",
        lambda body: b"\xef\xbb\xbf" + body,
        lambda body: body.replace(b'"epoch_min":1', b'"epoch_min":1,"epoch_min":1'),
        lambda body: body.replace(b'"epoch_min":1', b'"epoch_min":1.0'),
        lambda body: body.replace(b'"epoch_min":1', b'"epoch_min":1e0'),
        lambda body: body.replace(b"Fuzz", b"\\u0046uzz"),
        lambda body: body.replace(b"Fuzz", b"\xff"),
        lambda body: b'{"terms":' + body.split(b'"terms":')[1][:-1] + b',"keys":[]}',
        lambda body: body[:-1],
        lambda body: b"[" * 100_000,
        lambda body: b'{"keys":' * 50_000,
        lambda body: b"",
    ],
)
def test_another_spelling_of_the_same_licence_is_malformed(spelling: Any) -> None:
    body = canonical(document())
    assert spelling(body) != body
    assert refusal_of(spelling(body)) is Refusal.LICENCE_MALFORMED


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: b"",
        lambda raw: b"\n" * 100,
        lambda raw: raw[:-1],
        lambda raw: raw.replace(b"licence 1", b"licence 2"),
        lambda raw: raw.replace(b"strongroom", b"Strongroom"),
        lambda raw: b" " + raw,
        lambda raw: raw.replace(b"\n", b"\r\n", 1),
        lambda raw: raw.partition(b"\n")[2],
        lambda raw: raw.upper(),
        lambda raw: bytes(1000),
    ],
)
def test_a_file_of_another_form_is_malformed(edit: Any) -> None:
    assert verification(edit(licence_form.sign(sample(), PRIVATE))) is Refusal.LICENCE_MALFORMED


def test_nothing_is_parsed_before_the_signature_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: bytes) -> Licence:
        raise AssertionError("parsed")

    signed = licence_form.sign(sample(), PRIVATE)
    monkeypatch.setattr(licence_form, "parse", never)
    assert verification(signed.replace(b"Fuzz", b"Fuzy")) is Refusal.LICENCE_CHANGED
    with pytest.raises(AssertionError, match="parsed"):
        licence_form.verify(signed, ROOTS, NOW_S)


def test_no_flipped_bit_of_a_licence_is_accepted() -> None:
    """Every bit of the file: head, signature and body."""
    signed = licence_form.sign(sample(), PRIVATE)
    for bit in range(len(signed) * 8):
        changed = bytearray(signed)
        changed[bit // 8] ^= 1 << bit % 8
        assert verification(bytes(changed)).value.startswith("licence-")


def test_a_signature_over_a_manifest_does_not_sign_a_licence() -> None:
    body = canonical(document())
    signature = signing_keys.sign(PRIVATE, b"strongroom/package/v1/manifest", body)
    head = f"strongroom licence 1 {ROOTS[0].signer_id.hex()} {signature.hex()}\n".encode()
    assert verification(head + body + b"\n") is Refusal.LICENCE_CHANGED


def test_an_oversized_file_is_refused_by_its_size() -> None:
    assert verification(b"x" * (licence_form.MAX_LICENCE_BYTES + 1)) is Refusal.LICENCE_OVERSIZED


def test_hostile_input_is_answered_in_bounded_time_and_memory() -> None:
    """The short form of `python -m tests.model_package.licence_fuzz`."""
    answers = run(seed=5, cases=iter(range(400)))
    assert all(sum(counts.values()) == 400 for counts in answers.values()) and len(answers) == 5
    assert answers["licence file"]["licence-changed"] > 50
    assert answers["licence body"]["licence-malformed"] > 350
    assert answers["unlock message"]["unlock-malformed"] > 300
