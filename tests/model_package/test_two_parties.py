"""A vendor's base and a customer's adapter in one container: neither's key opens the other's.

The container is told both roots; every combination of a key, a package and an expectation that must not open
is refused with a message of its own.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from model_package import hpke, licence
from model_package.manifest import Manifest
from model_package.opener import Trust
from model_package.outcome import Outcome, PackageError
from model_package.providers import Means, provider
from model_package.recipients import Owner, Recipient, Scheme, key_id, unwrap
from model_package.refusal import KeyRefused, Refusal
from model_package.sealer import to_public_keys
from tests.model_package.parties import (
    CONTENT,
    DAY_S,
    NOW_S,
    Party,
    content,
    customer,
    fresh_key,
    issue,
    licensing,
    terms,
    trust,
    vendor,
)


class Scene:
    """Both parties, the base and the adapter made from it, as a container meets them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vendor, self.customer = vendor(), customer()
        self.base_key, self.adapter_key = fresh_key(), fresh_key()
        self.base = self.vendor.seal(folder / "base", self.base_key)
        self.adapter = self.customer.seal(folder / "adapter", self.adapter_key, base=self.base.as_base)

    def key_from(self, party: Party, manifest: Manifest) -> bytearray:
        """Ask for a package's data key with a party's private key, as `recipient:file:` does."""
        path = self.folder / f"{party.owner}.key"
        if not path.exists():
            path.write_bytes(party.recipient)
            path.chmod(0o400)
        return provider(f"recipient:file:{path}", Means({})).data_key(manifest)

    def trusted(self, owner: Owner, epoch: int = 0) -> Trust:
        base = self.base.as_base if owner is Owner.CUSTOMER else None
        return trust(owner, self.vendor, self.customer, base, epoch)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


def outcome_of(folder: Path, trusted: Trust, key: bytearray) -> Outcome:
    with pytest.raises(PackageError) as raised:
        content(folder, trusted, key)
    return raised.value.outcome


def test_each_party_opens_its_own(scene: Scene) -> None:
    base_key = scene.key_from(scene.vendor, scene.base)
    assert content(scene.folder / "base", scene.trusted(Owner.VENDOR), base_key) == CONTENT
    adapter_key = scene.key_from(scene.customer, scene.adapter)
    assert content(scene.folder / "adapter", scene.trusted(Owner.CUSTOMER), adapter_key) == CONTENT


def test_the_vendors_private_key_does_not_unwrap_the_adapter(scene: Scene) -> None:
    with pytest.raises(PackageError) as raised:
        scene.key_from(scene.vendor, scene.adapter)
    assert raised.value.outcome is Outcome.RECIPIENT_MISSING


def test_the_customers_private_key_does_not_unwrap_the_base(scene: Scene) -> None:
    with pytest.raises(PackageError) as raised:
        scene.key_from(scene.customer, scene.base)
    assert raised.value.outcome is Outcome.RECIPIENT_MISSING


def test_the_vendors_data_key_does_not_open_the_adapter_nor_the_customers_the_base(scene: Scene) -> None:
    folder, trusted = scene.folder / "adapter", scene.trusted(Owner.CUSTOMER)
    assert outcome_of(folder, trusted, bytearray(scene.base_key)) is Outcome.KEY_WRONG
    folder, trusted = scene.folder / "base", scene.trusted(Owner.VENDOR)
    assert outcome_of(folder, trusted, bytearray(scene.adapter_key)) is Outcome.KEY_WRONG


def test_a_wrapped_key_moved_into_the_other_partys_manifest_does_not_unwrap(scene: Scene) -> None:
    moved = msgspec.structs.replace(scene.adapter, recipients=scene.base.recipients)
    with pytest.raises(PackageError) as raised:
        scene.key_from(scene.vendor, moved)
    assert raised.value.outcome is Outcome.RECIPIENT_WRONG


def test_an_adapter_signed_by_the_vendor_is_refused_unless_the_customer_trusts_it(
    scene: Scene, tmp_path: Path
) -> None:
    posing = Party(Owner.CUSTOMER, signing=scene.vendor.signing, recipient=scene.customer.recipient)
    key = fresh_key()
    posing.seal(tmp_path / "adapter", key, base=scene.base.as_base)
    trusted = scene.trusted(Owner.CUSTOMER)
    assert outcome_of(tmp_path / "adapter", trusted, bytearray(key)) is Outcome.SIGNER_OF_OTHER_PARTY
    trusting = trust(Owner.CUSTOMER, vendor(), posing, scene.base.as_base)
    assert content(tmp_path / "adapter", trusting, key) == CONTENT


def test_a_base_signed_by_the_customer_is_refused(scene: Scene, tmp_path: Path) -> None:
    posing = Party(Owner.VENDOR, signing=scene.customer.signing)
    key = fresh_key()
    posing.seal(tmp_path / "base", key)
    assert outcome_of(tmp_path / "base", scene.trusted(Owner.VENDOR), key) is Outcome.SIGNER_OF_OTHER_PARTY


def test_an_adapter_in_the_bases_place_is_refused(scene: Scene, tmp_path: Path) -> None:
    posing = Party(Owner.CUSTOMER, signing=scene.vendor.signing)
    key = fresh_key()
    posing.seal(tmp_path / "base", key, base=scene.base.as_base)
    assert outcome_of(tmp_path / "base", scene.trusted(Owner.VENDOR), key) is Outcome.OWNER_WRONG


def test_an_adapter_for_another_base_is_refused(scene: Scene, tmp_path: Path) -> None:
    other = scene.vendor.seal(tmp_path / "other", fresh_key())
    key = fresh_key()
    scene.customer.seal(tmp_path / "adapter", key, base=other.as_base)
    assert outcome_of(tmp_path / "adapter", scene.trusted(Owner.CUSTOMER), key) is Outcome.BASE_WRONG


def test_an_older_epoch_is_refused_by_the_package_and_by_the_licence(scene: Scene) -> None:
    older = scene.trusted(Owner.VENDOR, epoch=scene.base.epoch + 1)
    assert outcome_of(scene.folder / "base", older, bytearray(scene.base_key)) is Outcome.EPOCH_TOO_OLD
    with pytest.raises(KeyRefused) as raised:
        licence.check_package(terms(scene.base.package_id, epoch_min=scene.base.epoch + 1), scene.base)
    assert raised.value.refusal is Refusal.LICENCE_EPOCH_ABOVE_PACKAGE


def test_a_licensed_container_opens_the_base_and_the_licence_gives_no_adapter(
    scene: Scene, tmp_path: Path
) -> None:
    """The whole way of an air-gapped host: licence, installation key, package, content."""
    installation = hpke.make_private()
    key_path, path = tmp_path / "installation", tmp_path / "licence"
    key_path.write_bytes(installation)
    key_path.chmod(0o400)
    agreed = terms(scene.base.package_id, epoch_min=scene.base.epoch)
    issue(path, scene.vendor, agreed, {scene.base.package_id: scene.base_key}, hpke.public_of(installation))
    means = Means({}, licensing=licensing(scene.vendor, state=tmp_path))
    licensed = provider(f"licence:{path},file:{key_path}", means)
    trusted = scene.trusted(Owner.VENDOR, epoch=agreed.epoch_min)
    assert content(scene.folder / "base", trusted, licensed.data_key(scene.base)) == CONTENT
    with pytest.raises(KeyRefused) as raised:
        licensed.data_key(scene.adapter)
    assert raised.value.refusal is Refusal.LICENCE_FOR_VENDOR_PACKAGES


def test_rewrapping_changes_who_opens_and_not_what_is_sealed(scene: Scene, tmp_path: Path) -> None:
    """Rotation of a recipient: the manifest is signed anew, sealed files and content digest stay."""
    newcomer = Party(Owner.VENDOR, signing=scene.vendor.signing)
    wrap = to_public_keys([hpke.public_of(newcomer.recipient)])
    rewrapped = msgspec.structs.replace(
        scene.base, recipients=tuple(wrap(scene.base.key_context, scene.base_key))
    )
    assert rewrapped.as_base == scene.base.as_base  # adapters stay bound to it
    again = Scene.__new__(Scene)
    again.folder = tmp_path
    assert again.key_from(newcomer, rewrapped) == scene.base_key
    with pytest.raises(PackageError) as raised:
        scene.key_from(scene.vendor, rewrapped)
    assert raised.value.outcome is Outcome.RECIPIENT_MISSING


def test_every_refusal_of_the_list_has_its_own_message(scene: Scene, tmp_path: Path) -> None:
    """The messages a customer would see for the cases above, all different."""
    outcomes = {
        Outcome.RECIPIENT_MISSING,
        Outcome.RECIPIENT_WRONG,
        Outcome.KEY_WRONG,
        Outcome.SIGNER_OF_OTHER_PARTY,
        Outcome.OWNER_WRONG,
        Outcome.BASE_WRONG,
        Outcome.EPOCH_TOO_OLD,
    }
    refusals = {
        Refusal.LICENCE_EXPIRED,
        Refusal.LICENCE_CHANGED,
        Refusal.LICENCE_TERMS_UNBOUND,
        Refusal.LICENCE_FOR_ANOTHER_INSTALLATION,
        Refusal.LICENCE_FOR_ANOTHER_PACKAGE,
        Refusal.LICENCE_EPOCH_ABOVE_PACKAGE,
    }
    messages = {PackageError(outcome).message for outcome in outcomes}
    messages |= {KeyRefused(refusal).message for refusal in refusals}
    assert len(messages) == len(outcomes) + len(refusals)


def test_an_expired_licence_gives_no_key(scene: Scene, tmp_path: Path) -> None:
    installation = hpke.make_private()
    key_path, path = tmp_path / "installation", tmp_path / "licence"
    key_path.write_bytes(installation)
    key_path.chmod(0o400)
    keys = {scene.base.package_id: scene.base_key}
    issue(path, scene.vendor, terms(scene.base.package_id), keys, hpke.public_of(installation))
    late = Means({}, licensing=licensing(scene.vendor, NOW_S + 38 * DAY_S))
    with pytest.raises(KeyRefused) as raised:
        provider(f"licence:{path},file:{key_path}", late).data_key(scene.base)
    assert raised.value.refusal is Refusal.LICENCE_EXPIRED


@pytest.mark.parametrize("key_bytes", [0, 16, 31, 33])
def test_what_unwraps_to_another_length_is_no_data_key(scene: Scene, key_bytes: int) -> None:
    private, context = bytearray(scene.customer.recipient), scene.adapter.key_context
    public = hpke.public_of(private)
    sealed = hpke.seal(public, context.info(), bytes(key_bytes))
    entry = Recipient(
        ciphertext=sealed[hpke.ENC_BYTES :].hex(),
        encapsulated=sealed[: hpke.ENC_BYTES].hex(),
        key_id=key_id(Scheme.X25519, public),
        scheme=Scheme.X25519,
    )
    with pytest.raises(PackageError) as raised:
        unwrap([entry], private, context)
    assert raised.value.outcome is Outcome.RECIPIENT_WRONG
