"""Unlocking by invocation: described, sealed, opened once, and refused in every other case."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest

from model_package import hpke, unlock
from model_package.manifest import Base, Manifest
from model_package.refusal import KeyRefused, Refusal
from tests.model_package.parties import customer, fresh_key, vendor

BASE = Base(content_sha256="ab" * 32, package_id="cd" * 16)
IMAGE = "1.2.3"


@pytest.fixture
def container() -> unlock.Container:
    return unlock.Container(BASE, IMAGE)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return customer().seal(tmp_path_factory.mktemp("a") / "adapter", fresh_key(), base=BASE)


def seal(description: bytes, manifest: Manifest, key: bytearray, *images: str) -> bytes:
    return unlock.seal(description, manifest, key, frozenset(images or (IMAGE,)))


def refusal_of(container: unlock.Container, raw: bytes, manifest: Manifest) -> Refusal:
    with pytest.raises(KeyRefused) as raised:
        container.open_message(raw, manifest)
    assert raised.value.__context__ is None
    return raised.value.refusal


def test_a_sealed_key_reaches_the_container(container: unlock.Container, adapter: Manifest) -> None:
    key = fresh_key()
    description = container.describe()
    message = seal(description, adapter, key)
    assert max(len(description), len(message)) < unlock.MAX_DOCUMENT_BYTES
    assert key.hex().encode() not in message
    assert container.open_message(message, adapter) == key


def test_a_description_tells_what_is_sealed_to(container: unlock.Container) -> None:
    told = json.loads(container.describe())
    assert told["base"] == {"content_sha256": BASE.content_sha256, "package_id": BASE.package_id}
    assert told["image_version"] == IMAGE
    assert json.loads(container.describe())["challenge"] != told["challenge"]


def test_a_replayed_message_is_refused(container: unlock.Container, adapter: Manifest) -> None:
    message = seal(container.describe(), adapter, fresh_key())
    container.open_message(message, adapter)
    assert refusal_of(container, message, adapter) is Refusal.UNLOCK_REPLAYED


def test_a_message_for_another_package_is_refused(
    container: unlock.Container, adapter: Manifest, tmp_path: Path
) -> None:
    other = customer().seal(tmp_path / "other", fresh_key(), base=BASE)
    message = seal(container.describe(), other, fresh_key())
    assert refusal_of(container, message, adapter) is Refusal.UNLOCK_FOR_ANOTHER_PACKAGE
    renamed = {**json.loads(message), "package": msgspec.to_builtins(adapter.as_base)}
    assert refusal_of(container, msgspec.json.encode(renamed), adapter) is Refusal.UNLOCK_WRONG


def test_a_message_for_another_container_or_start_is_refused(
    container: unlock.Container, adapter: Manifest
) -> None:
    message = seal(unlock.Container(BASE, IMAGE).describe(), adapter, fresh_key())
    assert refusal_of(container, message, adapter) is Refusal.UNLOCK_FOR_ANOTHER_CONTAINER
    mine = json.loads(container.describe())
    renamed = {**json.loads(message), "container_key": mine["container_key"]}
    assert refusal_of(container, msgspec.json.encode(renamed), adapter) is Refusal.UNLOCK_REPLAYED
    renamed["challenge"] = mine["challenge"]
    assert refusal_of(container, msgspec.json.encode(renamed), adapter) is Refusal.UNLOCK_WRONG


def test_garbage_does_not_use_up_an_honest_clients_challenge(
    container: unlock.Container, adapter: Manifest
) -> None:
    key = fresh_key()
    message = seal(container.describe(), adapter, key)
    garbage = {**json.loads(message), "ciphertext": "00" * 48}
    assert refusal_of(container, msgspec.json.encode(garbage), adapter) is Refusal.UNLOCK_WRONG
    assert container.open_message(message, adapter) == key


def test_a_client_gives_no_key_to_a_container_it_does_not_expect(
    container: unlock.Container, adapter: Manifest
) -> None:
    another = unlock.Container(Base(content_sha256="00" * 32, package_id=BASE.package_id), IMAGE)
    for described, images in ((container, ["1.2.4", "1.2"]), (another, [IMAGE])):
        with pytest.raises(KeyRefused) as raised:
            seal(described.describe(), adapter, fresh_key(), *images)
        assert raised.value.refusal is Refusal.CONTAINER_UNEXPECTED
    seal(container.describe(), adapter, fresh_key(), "1.2.4", IMAGE)


def test_a_bases_key_goes_to_a_container_that_waits_for_it(
    container: unlock.Container, tmp_path: Path
) -> None:
    base, key = vendor().seal(tmp_path / "base", fresh_key()), fresh_key()
    with pytest.raises(KeyRefused) as raised:
        seal(container.describe(), base, key)
    assert raised.value.refusal is Refusal.CONTAINER_UNEXPECTED
    waiting = unlock.Container(base.as_base, IMAGE)
    assert waiting.open_message(seal(waiting.describe(), base, key), base) == key


def test_a_container_that_shows_a_low_order_key_gets_no_key(
    container: unlock.Container, adapter: Manifest
) -> None:
    told = {**json.loads(container.describe()), "container_key": "00" * 32}
    with pytest.raises(KeyRefused) as raised:
        seal(msgspec.json.encode(told), adapter, fresh_key())
    assert raised.value.refusal is Refusal.UNLOCK_MALFORMED


def test_every_field_of_the_description_is_bound(container: unlock.Container, adapter: Manifest) -> None:
    """Someone between the two who edits the description makes the key unusable, not readable."""
    told = json.loads(container.describe())
    edited = [
        {**told, "image_version": "9"},
        {**told, "challenge": "00" * 16},
    ]
    for description in edited:
        edition = msgspec.json.encode(description)
        message = seal(edition, adapter, fresh_key(), description["image_version"])
        restored = {**json.loads(message), "challenge": told["challenge"]}
        assert refusal_of(container, msgspec.json.encode(restored), adapter) is Refusal.UNLOCK_WRONG


def test_outstanding_descriptions_are_bounded_and_the_oldest_gives_way(
    container: unlock.Container, adapter: Manifest
) -> None:
    first, second = (seal(container.describe(), adapter, fresh_key()) for _ in range(2))
    for _ in range(unlock.MAX_CHALLENGES - 1):
        container.describe()
    assert refusal_of(container, first, adapter) is Refusal.UNLOCK_REPLAYED
    container.open_message(second, adapter)


def test_nothing_opens_after_the_container_closed(container: unlock.Container, adapter: Manifest) -> None:
    message = seal(container.describe(), adapter, fresh_key())
    container.close()
    assert refusal_of(container, message, adapter) is Refusal.UNLOCK_REPLAYED
    assert container._private == bytes(hpke.PRIVATE_BYTES)


def test_a_key_of_another_length_is_not_sealed(container: unlock.Container, adapter: Manifest) -> None:
    for length in (0, 16, 33):
        with pytest.raises(KeyRefused) as raised:
            seal(container.describe(), adapter, bytearray(length))
        assert raised.value.refusal is Refusal.KEY_LENGTH_WRONG


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 4096,
        b'{"a":' * 800,
        b'{"challenge":"' + b"0" * 4096 + b'"}',
        b"1" * 4096,
        b"NaN",
    ],
)
def test_a_malformed_message_or_description_is_refused(
    container: unlock.Container, adapter: Manifest, raw: bytes
) -> None:
    assert refusal_of(container, raw, adapter) is Refusal.UNLOCK_MALFORMED
    with pytest.raises(KeyRefused) as raised:
        seal(raw, adapter, fresh_key())
    assert raised.value.refusal is Refusal.UNLOCK_MALFORMED


def test_a_message_or_description_above_its_bound_is_refused_unread(
    container: unlock.Container, adapter: Manifest
) -> None:
    description = container.describe()
    message = seal(description, adapter, fresh_key())
    padding = b" " * (unlock.MAX_DOCUMENT_BYTES + 1 - len(message))
    assert refusal_of(container, message + padding, adapter) is Refusal.UNLOCK_MALFORMED
    with pytest.raises(KeyRefused) as raised:
        seal(description + b" " * unlock.MAX_DOCUMENT_BYTES, adapter, fresh_key())
    assert raised.value.refusal is Refusal.UNLOCK_MALFORMED
    container.open_message(message + padding[1:], adapter)


def test_a_field_too_many_too_few_or_of_another_form_is_refused(
    container: unlock.Container, adapter: Manifest
) -> None:
    message = json.loads(seal(container.describe(), adapter, fresh_key()))
    edited = [{key: value for key, value in message.items() if key != left} for left in message]
    edited += [{**message, "extra": 1}, {**message, "format": 2}, {**message, "format": "1"}]
    edited += [{**message, name: message[name].upper() + "x"} for name in message if name.endswith("ed")]
    edited += [{**message, "ciphertext": message["ciphertext"] + "\n"}]
    for other in edited:
        raw = msgspec.json.encode(other)
        assert refusal_of(container, raw, adapter) is Refusal.UNLOCK_MALFORMED


def test_no_flipped_bit_of_a_message_hands_out_a_key(container: unlock.Container, adapter: Manifest) -> None:
    message = seal(container.describe(), adapter, fresh_key())
    random_bits = random.Random(7).sample(range(len(message) * 8), 400)
    for bit in random_bits:
        changed = bytearray(message)
        changed[bit // 8] ^= 1 << bit % 8
        assert refusal_of(container, bytes(changed), adapter).value.startswith("unlock-")
