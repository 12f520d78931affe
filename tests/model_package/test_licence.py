"""Licences: dates, grace, the clock that is turned back, and what a data key is bound to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from model_package import clock, hpke, licence, licence_form, signing_keys
from model_package.licence import GRACE_DAYS
from model_package.licence_form import Licence, Terms
from model_package.manifest import Manifest
from model_package.refusal import KeyRefused, Refusal
from model_package.signature import Root
from tests.model_package.parties import (
    DAY_S,
    NOW_S,
    Party,
    customer,
    fresh_key,
    issue,
    licensing,
    terms,
    vendor,
)


class Sold:
    """A vendor's package, a customer's installation, and the licence between them."""

    def __init__(self, folder: Path) -> None:
        self.vendor = vendor()
        self.data_key = fresh_key()
        self.installation = hpke.make_private()
        self.manifest = self.vendor.seal(folder / "package", self.data_key, epoch=5)
        self.path = folder / "licence"
        self.agreed = terms(self.manifest.package_id)
        self.licence = self.issue(self.agreed)

    def issue(self, agreed: Terms, issuer: Party | None = None) -> Licence:
        keys = {self.manifest.package_id: self.data_key}
        return issue(self.path, issuer or self.vendor, agreed, keys, hpke.public_of(self.installation))


@pytest.fixture
def sold(tmp_path: Path) -> Sold:
    return Sold(tmp_path)


def admission(sold: Sold, now_s: int = NOW_S, state: Path | None = None) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        licence.admit(sold.path, licensing(sold.vendor, now_s, state))
    assert raised.value.__context__ is None
    return raised.value.refusal


def unwrapping(held: Licence, manifest: Manifest, private: bytearray) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        licence.unwrap(held, manifest, private)
    assert raised.value.__context__ is None
    return raised.value.refusal


def test_a_licence_gives_the_data_key_to_its_installation(sold: Sold) -> None:
    verdict = licence.admit(sold.path, licensing(sold.vendor))
    assert verdict.licence == sold.licence
    key = licence.unwrap(verdict.licence, sold.manifest, sold.installation)
    assert isinstance(key, bytearray) and key == sold.data_key


def test_a_licence_is_readable_from_the_page_alone(sold: Sold) -> None:
    """KEYS.md, the bytes of a licence: json, hashlib and the library's primitives, nothing of the room's."""
    head, body, rest = sold.path.read_bytes().split(b"\n")
    words = head.decode().split(" ")
    assert words[:3] == ["strongroom", "licence", "1"] and rest == b""
    root = signing_keys.public_of(sold.vendor.signing)
    assert words[3] == hashlib.sha256(b"strongroom/package/v1/signer\0" + root).hexdigest()[:32]
    Ed25519PublicKey.from_public_bytes(root).verify(
        bytes.fromhex(words[4]), b"strongroom/licence/v1/document\0" + body
    )
    document = json.loads(body)
    agreed = json.dumps(document["terms"], sort_keys=True, separators=(",", ":")).encode()
    (key,) = document["keys"]
    public = hpke.public_of(sold.installation)
    label = b"strongroom/package/v1/recipient-key\0x25519\0"
    assert key["key_id"] == hashlib.sha256(label + public).hexdigest()[:32]
    digest = hashlib.sha256(b"strongroom/licence/v1/terms\0" + agreed).digest()
    sealed = bytes.fromhex(key["encapsulated"] + key["ciphertext"])
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    private = X25519PrivateKey.from_private_bytes(sold.installation)
    info = b"strongroom/licence/v1/key\0" + digest + bytes.fromhex(key["package_id"])
    opened = suite.decrypt(sealed, private, info)
    assert opened == sold.data_key


def test_a_licence_names_no_key(sold: Sold) -> None:
    text = sold.path.read_bytes()
    assert sold.data_key.hex().encode() not in text and sold.installation.hex().encode() not in text
    assert len(text.splitlines()) == 2 and json.loads(text.splitlines()[1])["terms"]["customer"]


@pytest.mark.parametrize(
    ("past_end_s", "days", "grace", "in_grace"),
    [
        (-30 * DAY_S, 30, 7, False),
        (-30 * DAY_S + 1, 30, 7, False),
        (-1, 1, 7, False),
        (0, 0, 7, False),
        (1, 0, 7, True),
        (DAY_S, 0, 6, True),
        (GRACE_DAYS * DAY_S - 1, 0, 1, True),
        (GRACE_DAYS * DAY_S, 0, 0, True),
    ],
)
def test_days_left_are_counted_to_the_end_of_grace(
    sold: Sold, past_end_s: int, days: int, grace: int, in_grace: bool
) -> None:
    verdict = licence.admit(sold.path, licensing(sold.vendor, sold.agreed.not_after_s + past_end_s))
    assert (verdict.days_left, verdict.grace_days_left, verdict.in_grace) == (days, grace, in_grace)


def test_an_expired_licence_is_refused_when_its_grace_is_over(sold: Sold) -> None:
    over_s = sold.agreed.not_after_s + GRACE_DAYS * DAY_S + 1
    assert admission(sold, over_s) is Refusal.LICENCE_EXPIRED
    assert admission(sold, over_s + 10 * 365 * DAY_S) is Refusal.LICENCE_EXPIRED


def test_a_licence_is_refused_before_its_first_day(sold: Sold) -> None:
    assert admission(sold, sold.agreed.not_before_s - 1) is Refusal.LICENCE_NOT_YET_VALID
    licence.admit(sold.path, licensing(sold.vendor, sold.agreed.not_before_s))


def test_an_engine_that_restarts_is_not_judged_again_by_date(sold: Sold, tmp_path: Path) -> None:
    """The hard stop is at the container's start and never while it serves."""
    late_s = sold.agreed.not_after_s + 60 * DAY_S
    state = tmp_path / "no such folder"
    verdict = licence.admit(sold.path, licensing(sold.vendor, late_s, state, started=True))
    assert (verdict.days_left, verdict.grace_days_left, verdict.in_grace) == (0, 0, True)


def test_a_licence_with_an_edited_date_is_refused_by_its_signature(sold: Sold) -> None:
    text = sold.path.read_bytes()
    old, new = (str(sold.agreed.not_after_s + later).encode() for later in (0, 365 * DAY_S))
    assert text.count(old) == 1
    sold.path.write_bytes(text.replace(old, new))
    assert admission(sold) is Refusal.LICENCE_CHANGED


def test_a_licence_with_an_edited_date_has_no_key_even_when_signed_again(sold: Sold) -> None:
    """Whoever holds a trusted signing key, but not the data key, cannot prolong a licence."""
    longer = msgspec.structs.replace(sold.agreed, not_after_s=sold.agreed.not_after_s + 365 * DAY_S)
    forged = msgspec.structs.replace(sold.licence, terms=longer)
    sold.path.write_bytes(licence_form.sign(forged, sold.vendor.signing))
    verdict = licence.admit(sold.path, licensing(sold.vendor))
    assert unwrapping(verdict.licence, sold.manifest, sold.installation) is Refusal.LICENCE_TERMS_UNBOUND


@pytest.mark.parametrize(
    "changed",
    [
        {"customer": "Example & Sons (Roma)"},
        {"epoch_min": 1},
        {"features": ("adapters",)},
        {"id": "2026-0043"},
        {"not_after_s": NOW_S + 31 * DAY_S},
        {"not_before_s": NOW_S - 2 * DAY_S},
    ],
)
def test_the_key_is_bound_to_every_term(sold: Sold, changed: dict[str, object]) -> None:
    forged = msgspec.structs.replace(sold.licence, terms=msgspec.structs.replace(sold.agreed, **changed))
    assert unwrapping(forged, sold.manifest, sold.installation) is Refusal.LICENCE_TERMS_UNBOUND


def test_a_further_package_in_the_terms_unbinds_the_key(sold: Sold, tmp_path: Path) -> None:
    other = sold.vendor.seal(tmp_path / "other", fresh_key())
    both = msgspec.structs.replace(
        sold.agreed, package_ids=tuple(sorted((sold.manifest.package_id, other.package_id)))
    )
    forged = msgspec.structs.replace(sold.licence, terms=both)
    assert unwrapping(forged, sold.manifest, sold.installation) is Refusal.LICENCE_TERMS_UNBOUND
    assert unwrapping(forged, other, sold.installation) is Refusal.LICENCE_FOR_ANOTHER_INSTALLATION


def test_a_key_moved_to_another_package_of_the_licence_does_not_unwrap(sold: Sold, tmp_path: Path) -> None:
    other = sold.vendor.seal(tmp_path / "other", fresh_key())
    agreed = terms(sold.manifest.package_id, other.package_id)
    made = licence.make(
        agreed, {sold.manifest.package_id: sold.data_key}, [hpke.public_of(sold.installation)]
    )
    moved = msgspec.structs.replace(made.keys[0], package_id=other.package_id)
    forged = msgspec.structs.replace(made, keys=(moved,))
    assert unwrapping(forged, other, sold.installation) is Refusal.LICENCE_TERMS_UNBOUND


def test_a_licence_for_another_installation_is_refused(sold: Sold) -> None:
    assert (
        unwrapping(sold.licence, sold.manifest, hpke.make_private())
        is Refusal.LICENCE_FOR_ANOTHER_INSTALLATION
    )


def test_a_licence_for_another_package_is_refused(sold: Sold, tmp_path: Path) -> None:
    other = sold.vendor.seal(tmp_path / "other", fresh_key())
    assert unwrapping(sold.licence, other, sold.installation) is Refusal.LICENCE_FOR_ANOTHER_PACKAGE


def test_a_package_older_than_the_licences_epoch_is_refused(sold: Sold) -> None:
    held = sold.issue(terms(sold.manifest.package_id, epoch_min=5))
    assert licence.unwrap(held, sold.manifest, sold.installation) == sold.data_key
    held = sold.issue(terms(sold.manifest.package_id, epoch_min=6))
    assert unwrapping(held, sold.manifest, sold.installation) is Refusal.LICENCE_EPOCH_ABOVE_PACKAGE


def test_a_licence_does_not_open_a_customers_package(sold: Sold, tmp_path: Path) -> None:
    adapter = customer().seal(tmp_path / "adapter", fresh_key(), base=sold.manifest.as_base)
    held = sold.issue(terms(sold.manifest.package_id, adapter.package_id))
    assert unwrapping(held, adapter, sold.installation) is Refusal.LICENCE_FOR_VENDOR_PACKAGES


def test_one_licence_serves_several_installations_and_packages(sold: Sold, tmp_path: Path) -> None:
    second_key, second = fresh_key(), hpke.make_private()
    other = sold.vendor.seal(tmp_path / "other", second_key)
    made = issue(
        sold.path,
        sold.vendor,
        terms(sold.manifest.package_id, other.package_id),
        {sold.manifest.package_id: sold.data_key, other.package_id: second_key},
        hpke.public_of(sold.installation),
        hpke.public_of(second),
    )
    assert len(made.keys) == 4
    for private in (sold.installation, second):
        assert licence.unwrap(made, sold.manifest, private) == sold.data_key
        assert licence.unwrap(made, other, private) == second_key


def test_a_licence_signed_by_anyone_else_is_refused(sold: Sold) -> None:
    sold.issue(sold.agreed, issuer=vendor())
    assert admission(sold) is Refusal.LICENCE_SIGNER_UNKNOWN


def test_a_licence_by_a_vendor_key_that_ran_out_is_refused(sold: Sold) -> None:
    public = signing_keys.public_of(sold.vendor.signing)
    raw = sold.path.read_bytes()
    licence_form.verify(raw, [Root(public, NOW_S)], NOW_S)
    with pytest.raises(KeyRefused) as raised:
        licence_form.verify(raw, [Root(public, NOW_S - 1)], NOW_S)
    assert raised.value.refusal is Refusal.LICENCE_SIGNER_EXPIRED


def test_two_vendor_roots_overlap_while_one_is_replaced(sold: Sold) -> None:
    roots = [vendor().root, sold.vendor.root]
    assert licence_form.verify(sold.path.read_bytes(), roots, NOW_S) == sold.licence


def test_what_is_no_licence_file_is_refused(sold: Sold, tmp_path: Path) -> None:
    sold.path.unlink()
    assert admission(sold) is Refusal.LICENCE_MISSING
    sold.path.mkdir()
    assert admission(sold) is Refusal.LICENCE_UNREADABLE
    sold.path.rmdir()
    os.mkfifo(sold.path)
    assert admission(sold) is Refusal.LICENCE_UNREADABLE
    sold.path.unlink()
    sold.path.symlink_to(sold.path)
    assert admission(sold) is Refusal.LICENCE_UNREADABLE
    sold.path.unlink()
    with sold.path.open("wb") as large:
        large.truncate(1 << 40)
    assert admission(sold) is Refusal.LICENCE_OVERSIZED


def test_a_clock_that_was_turned_back_is_refused(sold: Sold, tmp_path: Path) -> None:
    licence.admit(sold.path, licensing(sold.vendor, NOW_S, tmp_path))
    licence.admit(sold.path, licensing(sold.vendor, NOW_S - clock.TOLERANCE_S, tmp_path))
    assert admission(sold, NOW_S - clock.TOLERANCE_S - 1, tmp_path) is Refusal.CLOCK_TURNED_BACK
    licence.admit(sold.path, licensing(sold.vendor, NOW_S + DAY_S, tmp_path))
    assert admission(sold, NOW_S, tmp_path) is Refusal.CLOCK_TURNED_BACK


def test_a_clock_far_ahead_leaves_no_mark(sold: Sold, tmp_path: Path) -> None:
    assert admission(sold, NOW_S + 10_000 * DAY_S, tmp_path) is Refusal.LICENCE_EXPIRED
    licence.admit(sold.path, licensing(sold.vendor, NOW_S, tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"0",
        b"strongroom clock 1 1\n\n",
        b"strongroom clock 2 1\n",
        b"strongroom clock 1 -1\n",
        b"x" * 1000,
    ],
)
def test_a_damaged_clock_record_is_not_taken_for_none(sold: Sold, tmp_path: Path, content: bytes) -> None:
    (tmp_path / clock.RECORD).write_bytes(content)
    assert admission(sold, NOW_S, tmp_path) is Refusal.CLOCK_STATE_MALFORMED


def test_a_link_in_the_records_place_is_refused(sold: Sold, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"strongroom clock 1 1\n")
    (tmp_path / clock.RECORD).symlink_to(tmp_path / "real")
    assert admission(sold, NOW_S, tmp_path) is Refusal.CLOCK_STATE_MALFORMED


def test_a_state_directory_that_cannot_be_written_refuses_the_start(sold: Sold, tmp_path: Path) -> None:
    assert admission(sold, NOW_S, tmp_path / "none") is Refusal.CLOCK_STATE_UNWRITABLE


def test_the_clock_record_is_private_never_falls_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for now_s in (100, 300, 200):
        clock.record(tmp_path, now_s)
    record = tmp_path / clock.RECORD
    assert record.read_bytes() == b"strongroom clock 1 300\n"
    assert record.stat().st_mode & 0o7777 == 0o600
    assert list(tmp_path.iterdir()) == [record]


def test_a_start_that_was_killed_while_recording_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as here:
        here.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            clock.record(tmp_path, 100)
    assert list(tmp_path.iterdir())  # what it had begun
    clock.record(tmp_path, 100)
    clock.check(tmp_path, 100)


def test_a_record_that_cannot_be_renamed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(KeyRefused) as raised:
        clock.record(tmp_path, 100)
    assert raised.value.refusal is Refusal.CLOCK_STATE_UNWRITABLE
    assert not list(tmp_path.iterdir())
