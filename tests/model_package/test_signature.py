"""Roots come from the caller, are real keys, few, and each for its owner."""

from __future__ import annotations

import pytest

from model_package import signature, signing_keys
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from model_package.signature import MAX_ROOTS, Root, Roots
from tests.model_package import making

DOCUMENT = b"a manifest"


def outcome_of(signed: bytes, roots: Roots, owner: Owner = Owner.VENDOR, now_s: int = 100) -> Outcome:
    try:
        signature.check(signed, DOCUMENT, roots, owner, now_s)
    except PackageError as error:
        return error.outcome
    return Outcome.OPENED


def test_a_signature_holds_under_its_own_root_and_owner_alone() -> None:
    signed = signature.sign(DOCUMENT, making.key("vendor"))
    assert len(signed) == signature.SIGNATURE_FILE_BYTES
    assert outcome_of(signed, making.ROOTS) is Outcome.OPENED
    assert signature.check(signed, DOCUMENT, making.ROOTS, Owner.VENDOR, 1) == making.root("vendor")
    assert outcome_of(signed, making.ROOTS, Owner.CUSTOMER) is Outcome.SIGNER_OF_OTHER_PARTY
    assert outcome_of(signed, Roots()) is Outcome.SIGNER_UNKNOWN


def test_two_roots_overlap_while_a_key_is_replaced() -> None:
    old, new = making.root("old", not_after_s=100), making.root("new")
    roots = Roots(vendor=(old, new))
    for name in ("old", "new"):
        assert outcome_of(signature.sign(DOCUMENT, making.key(name)), roots, now_s=100) is Outcome.OPENED
    signed = signature.sign(DOCUMENT, making.key("old"))
    assert outcome_of(signed, roots, now_s=101) is Outcome.SIGNER_EXPIRED
    assert outcome_of(signature.sign(DOCUMENT, making.key("new")), roots, now_s=2**40) is Outcome.OPENED


def test_a_signature_for_another_purpose_is_none_over_a_manifest() -> None:
    """The same key and bytes, signed as something else."""
    root = making.root("vendor")
    other = signing_keys.sign(making.key("vendor"), b"strongroom/package/v1/licence", DOCUMENT)
    assert outcome_of(signature.MAGIC + root.signer_id + other, making.ROOTS) is Outcome.SIGNATURE_WRONG


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), b"\x01" + bytes(31), b"\xff" * 32])
def test_what_is_no_key_or_of_low_order_is_no_root(public: bytes) -> None:
    """Under a key of low order, one signature holds over any manifest."""
    with pytest.raises(signing_keys.SigningKeyRefused):
        Root(public)


@pytest.mark.parametrize("owner", ["vendor", "customer"])
def test_a_reader_is_given_few_roots(owner: str) -> None:
    roots = tuple(making.root(str(number)) for number in range(MAX_ROOTS + 1))
    Roots(**{owner: roots[:MAX_ROOTS]})
    with pytest.raises(ValueError, match="more than 16 roots"):
        Roots(**{owner: roots})
