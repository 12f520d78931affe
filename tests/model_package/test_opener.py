"""Opening, beyond what the vectors show: bits flipped everywhere, limits, what a failure leaves behind."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_package import manifest, opener, recipients, sealer, storage
from model_package.layout import Kind
from model_package.manifest import Manifest
from model_package.opener import Package, SealedTensor, open_package
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner, Scheme
from tests.model_package import making
from tests.model_package.making import CHUNK

FLIPS = 1_000


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """One small package of four files with a recipient; read only."""
    root = tmp_path_factory.mktemp("sealed")
    installation = recipients.hpke.public_of(making.key("installation"))
    made = making.seal(making.model(root / "plain"), root / "package", seed=1, recipients=[installation])
    return root / "package", made


@pytest.fixture
def package(sealed: tuple[Path, Manifest], tmp_path: Path) -> tuple[Path, Manifest]:
    """A copy to change."""
    shutil.copytree(sealed[0], tmp_path / "package")
    return tmp_path / "package", sealed[1]


def outcome_of(path: Path, data_key: str = "data") -> Outcome:
    """Open a package and read all of it; return what became of it."""
    try:
        with open_package(path, making.trust()) as package, package.unlock(making.key(data_key)) as contents:
            making.read_all(contents)
    except PackageError as error:
        return error.outcome
    return Outcome.OPENED


def regions(path: Path, made: Manifest) -> Iterator[tuple[str, Path, int, int]]:
    """Yield (what it is, file, first byte, end) of every region of a package."""
    for name in ("manifest.json", "manifest.sig"):
        yield name, path / name, 0, (path / name).stat().st_size
    for entry in made.files:
        file = path / entry.stored_name
        chunks = int.from_bytes(file.read_bytes()[44:48], "little")
        body = 64 + 32 * chunks
        for place in range(64):
            yield "header", file, place, place + 1
        yield "index", file, 64, body
        yield "chunks", file, body, entry.size
        yield "last tag", file, entry.size - 16, entry.size
        if entry.kind is Kind.TENSORS:
            table = int.from_bytes(file.read_bytes()[48:56], "little")
            yield "table of contents", file, body, body + table
            yield "tag of the table", file, body + table, body + table + 16


def test_a_thousand_flipped_bits_are_a_thousand_refusals(package: tuple[Path, Manifest]) -> None:
    """Over every region in turn; each region gets several, each byte of the headers one at least."""
    path, made = package
    rng = random.Random(20261123)
    known = list(regions(path, made))
    assert len(known) > 250
    accepted = []
    for number in range(FLIPS):
        what, file, begin, end = known[number % len(known)]
        place, bit = rng.randrange(begin, end), 1 << rng.randrange(8)
        with file.open("r+b") as handle:
            handle.seek(place)
            byte = handle.read(1)[0]
            handle.seek(place)
            handle.write(bytes([byte ^ bit]))
            handle.flush()
            if outcome_of(path) is Outcome.OPENED:
                accepted.append((what, place, bit))
            handle.seek(place)
            handle.write(bytes([byte]))
    assert accepted == []
    assert outcome_of(path) is Outcome.OPENED  # and it was the flips


def test_every_byte_of_signature_and_header_counts(package: tuple[Path, Manifest]) -> None:
    path, made = package
    files = [path / "manifest.sig", *(path / entry.stored_name for entry in made.files)]
    for file in files:
        good = file.read_bytes()
        for place in range(min(88, len(good))):
            file.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
            assert outcome_of(path) is not Outcome.OPENED
        file.write_bytes(good)
    assert outcome_of(path) is Outcome.OPENED


def test_nothing_is_allocated_for_a_manifest_above_its_bound(package: tuple[Path, Manifest]) -> None:
    """A hole of a terabyte: were it read, this test would not end."""
    path, _ = package
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(manifest.MAX_MANIFEST_BYTES + 1)
    assert outcome_of(path) is Outcome.MANIFEST_OVERSIZED
    os.truncate(path / "manifest.json", 2**40)
    assert outcome_of(path) is Outcome.MANIFEST_OVERSIZED
    os.truncate(path / "manifest.sig", 2**40)
    os.truncate(path / "manifest.json", 100)
    assert outcome_of(path) is Outcome.SIGNATURE_MALFORMED


def test_what_the_system_refuses_to_read_is_unreadable(
    package: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = package

    def fail(*_: object, **__: object) -> int:
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "preadv", fail)
        assert outcome_of(path) is Outcome.UNREADABLE
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", fail)
        assert outcome_of(path) is Outcome.UNREADABLE


def test_pipes_and_sockets_are_refused_without_waiting(package: tuple[Path, Manifest]) -> None:
    """A pipe nobody writes to would block an ordinary open for ever."""
    path, made = package
    for name in ("manifest.json", "manifest.sig", made.files[0].stored_name):
        good = (path / name).read_bytes()
        (path / name).unlink()
        os.mkfifo(path / name)
        assert outcome_of(path) is Outcome.NOT_A_REGULAR_FILE
        (path / name).unlink()
        (path / name).write_bytes(good)
    assert outcome_of(path) is Outcome.OPENED


def test_a_directory_that_is_none_holds_no_package(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        assert outcome_of(tmp_path / name) is Outcome.MANIFEST_MISSING


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_stays_open_whatever_happened(package: tuple[Path, Manifest]) -> None:
    path, made = package
    last = path / made.files[-1].stored_name
    before = descriptors()
    assert outcome_of(path) is Outcome.OPENED
    assert outcome_of(path, data_key="another") is Outcome.KEY_WRONG
    good = last.read_bytes()
    for content in (good[:-1], bytes(len(good)), good[:70] + bytes(len(good) - 70)):
        last.write_bytes(content)
        assert outcome_of(path) is not Outcome.OPENED
    last.unlink()
    assert outcome_of(path) is Outcome.FILE_MISSING
    assert descriptors() == before


def first_tensor(package: Package, threads: int) -> SealedTensor:
    return next(package.unlock(making.key("data"), threads).tensors("model.safetensors"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [0, 1, 2, 3])
def test_a_failed_read_leaves_zeros_in_the_callers_memory(
    chunk: int, threads: int, package: tuple[Path, Manifest]
) -> None:
    """Whole reads and ranges; what was opened before the bad chunk came is taken back."""
    path, made = package
    (entry,) = [entry for entry in made.files if entry.kind is Kind.TENSORS]
    with open_package(path, making.trust()) as opened:
        tensor = first_tensor(opened, threads)
        body = sum(len(data) for *_, data in making.tensors()) + 16 * 8
        place = entry.size - body + chunk * (CHUNK + 16)
        with (path / entry.stored_name).open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        for start, length in ((0, tensor.data_bytes), (1, tensor.data_bytes - 2)):
            memory = bytearray(b"\xaa" * length)
            with pytest.raises(PackageError) as caught:
                tensor.read_range(start, memory)
            assert caught.value.outcome is Outcome.CHUNK_WRONG
            assert memory == bytes(length)


def test_the_data_key_is_wiped_when_it_is_right_and_when_it_is_wrong(sealed: tuple[Path, Manifest]) -> None:
    with open_package(sealed[0], making.trust()) as package:
        right, wrong = making.key("data"), making.key("another")
        package.unlock(right).close()
        with pytest.raises(PackageError):
            package.unlock(wrong)
        assert right == wrong == bytearray(32)


def test_no_error_shows_a_name_a_key_or_content(package: tuple[Path, Manifest]) -> None:
    """Not in its text, nor in what stands around an object in a traceback."""
    path, made = package
    with open_package(path, making.trust()) as opened, opened.unlock(making.key("data")) as contents:
        tensor = next(contents.tensors("model.safetensors"))
        shown = repr(tensor) + repr(contents) + repr(opened)
    (path / made.files[0].stored_name).write_bytes(b"not sealed at all")
    with pytest.raises(PackageError) as caught:
        open_package(path, making.trust())
    shown += repr(caught.value) + str(caught.value)
    for secret in (
        tensor.name,
        "config.json",
        made.files[0].file_id,
        making.key("data").hex(),
        made.commitment,
    ):
        assert secret not in shown


def test_whoever_has_the_root_proves_every_byte_without_a_key(package: tuple[Path, Manifest]) -> None:
    path, made = package
    done: list[int] = []
    with open_package(path, making.trust()) as opened:
        opened.prove_whole(done.append)
    assert done[-1] == sum(entry.size for entry in made.files)
    file = path / made.files[-1].stored_name
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    with open_package(path, making.trust()) as opened, pytest.raises(PackageError) as caught:
        opened.prove_whole()
    assert caught.value.outcome is Outcome.CHUNK_WRONG


def test_the_data_key_unwraps_for_its_recipient_alone(sealed: tuple[Path, Manifest]) -> None:
    path, made = sealed
    with open_package(path, making.trust()) as opened:
        data_key = recipients.unwrap(made.recipients, making.key("installation"), made.key_context)
        assert data_key == making.key("data")
        with opened.unlock(data_key) as contents:
            assert contents.file("config.json") is not None
    with pytest.raises(PackageError) as caught:
        recipients.unwrap(made.recipients, making.key("stranger"), made.key_context)
    assert caught.value.outcome is Outcome.RECIPIENT_MISSING
    ids = {recipients.key_id(scheme, b"one key") for scheme in Scheme}
    assert len(ids) == len(Scheme)  # the same key under another scheme is another recipient


def test_adapters_open_on_their_base_alone_and_with_their_owners_key_alone(tmp_path: Path) -> None:
    """The two parties: keys, roots and bases crossed in every way."""
    base = making.seal(making.model(tmp_path / "plain"), tmp_path / "base")
    other = making.seal(making.model(tmp_path / "plain 2", seed=2), tmp_path / "other")
    adapter_files = making.model(tmp_path / "adapter plain", seed=3)
    adapter = tmp_path / "adapter"
    making.seal(adapter_files, adapter, Owner.CUSTOMER, "customer data", base=base.as_base)

    def opens(owner: Owner, chosen: manifest.Base | None, data_key: str, path: Path) -> Outcome:
        try:
            with open_package(path, making.trust(owner, base=chosen)) as package:
                package.unlock(making.key(data_key)).close()
        except PackageError as error:
            return error.outcome
        return Outcome.OPENED

    customer, vendor = Owner.CUSTOMER, Owner.VENDOR
    assert opens(customer, base.as_base, "customer data", adapter) is Outcome.OPENED
    assert opens(customer, other.as_base, "customer data", adapter) is Outcome.BASE_WRONG
    assert opens(customer, None, "customer data", adapter) is Outcome.BASE_WRONG
    assert opens(customer, base.as_base, "data", adapter) is Outcome.KEY_WRONG
    assert opens(vendor, None, "customer data", tmp_path / "base") is Outcome.KEY_WRONG
    assert opens(vendor, base.as_base, "customer data", adapter) is Outcome.SIGNER_OF_OTHER_PARTY
    assert opens(customer, None, "data", tmp_path / "base") is Outcome.SIGNER_OF_OTHER_PARTY


def test_wrapping_for_others_leaves_adapters_bound(tmp_path: Path) -> None:
    """The content digest does not cover recipients, epoch or signature; a whole-manifest digest would."""
    made = making.seal(making.model(tmp_path / "plain"), tmp_path / "base", seed=1)
    installation = recipients.hpke.public_of(making.key("installation"))
    (wrapped,) = sealer.to_public_keys([installation])(made.key_context, making.key("data"))
    fields = {name: getattr(made, name) for name in made.__struct_fields__}
    changed = Manifest(**(fields | {"recipients": (wrapped,), "epoch": 9, "created_s": 1}))
    assert changed.as_base == made.as_base
    for name, value in (("files", made.files[:1]), ("commitment", "0" * 64), ("owner", Owner.CUSTOMER)):
        assert Manifest(**(fields | {name: value})).content_sha256 != made.content_sha256


def test_a_blob_is_not_read_whole_above_its_bound(
    package: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "config.json"
    with open_package(package[0], making.trust()) as opened, opened.unlock(making.key("data")) as contents:
        length = len(contents.file(name) or b"")
        monkeypatch.setattr(opener, "MAX_BLOB_READ_BYTES", length)
        assert contents.file(name) is not None
        monkeypatch.setattr(opener, "MAX_BLOB_READ_BYTES", length - 1)
        with pytest.raises(ValueError, match=f"exceeds {length - 1} bytes"):
            contents.file(name)
