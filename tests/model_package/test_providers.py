"""Providers: every key source of the closed list, asked for the data key of a real package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from model_package import hpke, schedule, unlock
from model_package.manifest import Base, Manifest
from model_package.outcome import Outcome, PackageError
from model_package.providers import Means, Provider, provider
from model_package.recipients import Recipient, Scheme, key_id
from model_package.refusal import KeyRefused, Refusal
from model_package.signature import Root
from model_package.signing_keys import SigningKeyRefused
from tests.model_package.parties import Party, fresh_key, issue, licensing, terms, vendor

ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
BASE = Base(content_sha256="ab" * 32, package_id="cd" * 16)


class Service:
    """A key service that keeps what it encrypted: ciphertext -> (key's ARN, context, plaintext)."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[str, dict[str, str], bytearray]] = {}
        self.granted = True

    def encrypt(self, arn: str, context: Mapping[str, str], plaintext: bytearray) -> bytes:
        ciphertext = os.urandom(184)
        self.kept[ciphertext] = (arn, dict(context), bytearray(plaintext))
        return ciphertext

    def decrypt(self, key_arn: str, ciphertext: bytes, context: Mapping[str, str]) -> bytearray:
        arn, expected, plaintext = self.kept[ciphertext]
        if not self.granted or (arn, expected) != (key_arn, context):
            raise KeyRefused(Refusal.SERVICE_REFUSED)
        return bytearray(plaintext)


class Bench:
    """A vendor's package wrapped for its recipient and for a key service."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vendor = vendor()
        self.service = Service()
        self.data_key = fresh_key()
        self.manifest = self.vendor.seal(folder / "package", self.data_key)
        context = self.manifest.key_context.encryption_context()
        entry = Recipient(
            ciphertext=self.service.encrypt(ARN, context, self.data_key).hex(),
            encapsulated="",
            key_id=key_id(Scheme.KMS, ARN.encode()),
            scheme=Scheme.KMS,
        )
        self.manifest = msgspec.structs.replace(self.manifest, recipients=(entry, *self.manifest.recipients))

    def file(self, name: str, content: bytes | bytearray) -> str:
        path = self.folder / name
        path.write_bytes(content)
        path.chmod(0o400)
        return f"file:{path}"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def holds(asked: Provider, manifest: Manifest) -> None:
    """Assert that the provider's key is the one the package commits to."""
    key = asked.data_key(manifest)
    assert isinstance(key, bytearray)
    schedule.check_commitment(key, bytes.fromhex(manifest.package_id), bytes.fromhex(manifest.commitment))


def refusal_of(uri: str, means: Means, manifest: Manifest | None = None) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        asked = provider(uri, means)
        assert manifest is not None, "parsing should have refused"
        asked.data_key(manifest)
    assert raised.value.__context__ is None
    return raised.value.refusal


def test_a_source_gives_the_data_key_itself(bench: Bench) -> None:
    asked = provider(bench.file("key", bench.data_key), Means({}))
    holds(asked, bench.manifest)
    assert asked.reusable and not asked.caution
    environment = {"KEY": bench.data_key.hex()}
    development = provider("env:KEY", Means(environment, development=True))
    assert development.caution
    holds(development, bench.manifest)
    assert refusal_of("env:KEY", Means({"KEY": "x"})) is Refusal.SOURCE_FOR_DEVELOPMENT


def test_a_channel_gives_the_data_key(bench: Bench) -> None:
    folder = bench.folder / "vendor-key"
    folder.mkdir()
    (folder / "key").write_bytes(bench.data_key)
    holds(provider("channel:vendor-key", Means({}, channels=bench.folder)), bench.manifest)


def test_a_private_key_unwraps_what_the_manifest_holds(bench: Bench) -> None:
    asked = provider("recipient:" + bench.file("private", bench.vendor.recipient), Means({}))
    holds(asked, bench.manifest)
    assert asked.reusable
    once = provider("recipient:" + bench.file("private2", bench.vendor.recipient) + "?unlink", Means({}))
    assert not once.reusable


def test_the_private_key_is_wiped_after_unwrapping(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    private = bytearray(bench.vendor.recipient)
    asked = provider("recipient:file:/key", Means({}))
    monkeypatch.setattr("model_package.key_files.read_file", lambda *_, **__: private)
    holds(asked, bench.manifest)
    assert not any(private)
    private[:] = os.urandom(32)
    with pytest.raises(PackageError) as raised:
        asked.data_key(bench.manifest)
    assert raised.value.outcome is Outcome.RECIPIENT_MISSING
    assert not any(private)


@pytest.mark.parametrize("scheme", ["licence", "license"])
def test_a_licence_unwraps_for_the_installation(bench: Bench, scheme: str) -> None:
    installation = hpke.make_private()
    path = bench.folder / "licence"
    keys = {bench.manifest.package_id: bench.data_key}
    issue(path, bench.vendor, terms(bench.manifest.package_id), keys, hpke.public_of(installation))
    source = bench.file(f"installation-{scheme}", installation)
    asked = provider(f"{scheme}:{path},{source}", Means({}, licensing=licensing(bench.vendor)))
    holds(asked, bench.manifest)
    assert asked.reusable and not asked.caution
    foreign = Means({}, licensing=licensing(Party(bench.vendor.owner)))
    refused = refusal_of(f"{scheme}:{path},{source}", foreign, bench.manifest)
    assert refused is Refusal.LICENCE_SIGNER_UNKNOWN


def test_a_licence_needs_a_vendor_root(bench: Bench) -> None:
    assert refusal_of("licence:/l,file:/k", Means({})) is Refusal.SOURCE_WITHOUT_ROOTS


@pytest.mark.parametrize(
    "uri",
    [
        "licence:",
        "licence:/path",
        "licence:/path,",
        "licence:path,file:/k",
        "licence:/path,file:k",
        "kms:",
        "kms:alias/x",
        "kms:arn:aws:kms:eu-west-1:111122223333:alias/x",
        "kms:arn:aws:s3:eu-west-1:111122223333:key/x",
        ARN.replace("arn", "kms:arn") + "/../x",
        "kms:" + ARN + "\n",
        "recipient:file:relative",
        "invocation:now",
    ],
)
def test_another_form_is_refused_before_anything_is_read(bench: Bench, uri: str) -> None:
    means = Means({}, decrypter=bench.service, licensing=licensing(bench.vendor))
    assert refusal_of(uri, means) is Refusal.SOURCE_MALFORMED


@pytest.mark.parametrize("uri", ["", "recipient:", "recipient:kms:x", "recipient:recipient:file:/k", "tpm:x"])
def test_a_source_outside_the_list_is_refused(uri: str) -> None:
    assert refusal_of(uri, Means({})) is Refusal.SOURCE_UNKNOWN


def test_attested_release_is_refused_by_name() -> None:
    for uri in ("attest:", "attest:https://broker.example"):
        assert refusal_of(uri, Means({})) is Refusal.SOURCE_NOT_BUILT


def test_a_key_service_decrypts_for_this_package_alone(bench: Bench, tmp_path: Path) -> None:
    means = Means({}, decrypter=bench.service)
    holds(provider(f"kms:{ARN}", means), bench.manifest)
    other = msgspec.structs.replace(bench.manifest, package_id="00" * 16)
    assert refusal_of(f"kms:{ARN}", means, other) is Refusal.SERVICE_REFUSED
    bench.service.granted = False  # the grant was retired
    assert refusal_of(f"kms:{ARN}", means, bench.manifest) is Refusal.SERVICE_REFUSED
    with pytest.raises(PackageError) as raised:
        provider(f"kms:{ARN[:-1]}c", means).data_key(bench.manifest)
    assert raised.value.outcome is Outcome.RECIPIENT_MISSING


def test_a_service_key_of_another_length_is_wiped_and_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = bytearray(b"k" * 31)
    monkeypatch.setattr(bench.service, "decrypt", lambda *_: short)
    refused = refusal_of(f"kms:{ARN}", Means({}, decrypter=bench.service), bench.manifest)
    assert refused is Refusal.KEY_LENGTH_WRONG and not any(short)


def test_an_isolated_process_has_no_key_service() -> None:
    assert refusal_of(f"kms:{ARN}", Means({})) is Refusal.SOURCE_WITHOUT_SERVICE


def test_an_invocation_hands_the_key_over_once(bench: Bench) -> None:
    container = unlock.Container(bench.manifest.as_base, "1")
    locked = Means({}, container=container)
    assert refusal_of("invocation:", locked, bench.manifest) is Refusal.UNLOCK_PENDING
    message = unlock.seal(container.describe(), bench.manifest, bench.data_key, frozenset("1"))
    asked = provider("invocation:", Means({}, container=container, unlock_message=message))
    assert not asked.reusable
    holds(asked, bench.manifest)
    again = Means({}, container=container, unlock_message=message)
    assert refusal_of("invocation:", again, bench.manifest) is Refusal.UNLOCK_REPLAYED


def test_a_process_that_answers_no_calls_cannot_be_unlocked_by_one() -> None:
    assert refusal_of("invocation:", Means({})) is Refusal.SOURCE_WITHOUT_CALLS


def test_no_repr_shows_what_a_provider_was_given(bench: Bench) -> None:
    means = Means({"KEY": "the key"}, unlock_message=b"the message", container=unlock.Container(BASE, "1"))
    asked = provider("invocation:", means)
    assert "the key" not in repr(means) and "the message" not in repr(means) + repr(asked)


def test_roots_of_low_order_would_sign_anything_and_are_refused() -> None:
    with pytest.raises(SigningKeyRefused):
        Root(bytes([1] + [0] * 31))


def test_what_somebody_kept_stands_in_for_the_source(tmp_path: Path) -> None:
    """Of a source that gives its key once, wherever it stands in the URI."""

    class Kept:
        reusable = True
        caution = ""

        def read(self) -> bytearray:
            return bytearray(b"k" * 32)

    means = Means({}, licensing=licensing(vendor()), kept=Kept())
    for uri in ("fd:7", "file:/gone?unlink", "recipient:fd:7", "licence:/a,fd:7"):
        asked = provider(uri, means)
        assert asked.reusable and asked.source.read() == b"k" * 32  # type: ignore[attr-defined]
