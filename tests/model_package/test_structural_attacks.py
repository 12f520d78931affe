"""The 22 structural attacks, each on packages that the sealer made, each with its own refusal.

The attacker may be anyone who can write to the volume; where it says so, also a customer who holds the data
key, or another owner's signature. What the owner himself signed wrongly is in the vectors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from model_package import signature
from model_package.manifest import Manifest
from model_package.opener import open_package
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from tests.model_package import making
from tests.model_package.making import CHUNK

STEP = CHUNK + 16


@dataclass
class Stage:
    """The package under attack, and others to steal from."""

    path: Path
    made: Manifest
    other: Path  # another package under the same data key
    other_made: Manifest

    def file(self, name: str = "model.safetensors") -> Path:
        (entry,) = [entry for entry in self.made.files if entry.name == name]
        return self.path / entry.stored_name

    def edit(self, edit: Callable[[bytearray], None], name: str = "model.safetensors") -> None:
        raw = bytearray(self.file(name).read_bytes())
        edit(raw)
        self.file(name).write_bytes(raw)

    def set(self, offset: int, value: bytes) -> None:
        self.edit(lambda raw: raw.__setitem__(slice(offset, offset + len(value)), value))

    def rename_in_manifest(self, *names: str) -> None:
        """Sign a manifest with these file names, as an owner who was tricked would."""
        listed = json.loads((self.path / "manifest.json").read_bytes())
        for entry, name in zip(listed["files"], names, strict=False):
            entry["name"] = name
        listed["files"].sort(key=lambda entry: entry["name"])
        raw = json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()
        (self.path / "manifest.json").write_bytes(raw)
        self.sign("vendor")

    def sign(self, name: str) -> None:
        raw = (self.path / "manifest.json").read_bytes()
        (self.path / "manifest.sig").write_bytes(signature.sign(raw, making.key(name)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    root = tmp_path_factory.mktemp("built")
    made = making.seal(making.model(root / "plain"), root / "package")
    other = making.seal(root / "plain", root / "other")
    return Stage(root / "package", made, root / "other", other)


@pytest.fixture
def stage(built: Stage, tmp_path: Path) -> Stage:
    shutil.copytree(built.path, tmp_path / "package")
    return Stage(tmp_path / "package", built.made, built.other, built.other_made)


def refusal(path: Path, data_key: str = "data", **given: object) -> Outcome:
    """Open and read everything; return what became of it."""
    try:
        package = open_package(path, making.trust(**given))  # type: ignore[arg-type]
        with package, package.unlock(making.key(data_key)) as contents:
            making.read_all(contents)
    except PackageError as error:
        return error.outcome
    return Outcome.OPENED


def chunks_at(raw: bytearray) -> int:
    """Return where the first tensor's chunks begin."""
    chunks, table = int.from_bytes(raw[44:48], "little"), int.from_bytes(raw[48:56], "little")
    return 64 + 32 * chunks + table + 16


def swap(raw: bytearray, one: int, other: int, length: int) -> None:
    raw[one : one + length], raw[other : other + length] = (
        raw[other : other + length],
        raw[one : one + length],
    )


def test_the_package_opens_unless_attacked(stage: Stage) -> None:
    assert refusal(stage.path) is refusal(stage.other) is Outcome.OPENED


def test_01_a_plaintext_file_in_place_of_a_sealed_one(stage: Stage) -> None:
    plain = making.safetensors(making.tensors())
    stage.file().write_bytes(plain)
    assert refusal(stage.path) is Outcome.SIZE_WRONG
    size = next(entry.size for entry in stage.made.files if entry.name == "model.safetensors")
    stage.file().write_bytes(plain.ljust(size))
    assert refusal(stage.path) is Outcome.NOT_SEALED


def test_02_the_manifest_removed(stage: Stage) -> None:
    (stage.path / "manifest.json").unlink()
    assert refusal(stage.path) is Outcome.MANIFEST_MISSING


def test_03_the_signature_removed(stage: Stage) -> None:
    (stage.path / "manifest.sig").unlink()
    assert refusal(stage.path) is Outcome.SIGNATURE_MISSING


def test_04_a_signature_by_an_unknown_key(stage: Stage) -> None:
    stage.sign("stranger")
    assert refusal(stage.path) is Outcome.SIGNER_UNKNOWN


def test_05_a_signature_by_the_customer_on_a_vendors_package(stage: Stage) -> None:
    stage.sign("customer")
    assert refusal(stage.path) is Outcome.SIGNER_OF_OTHER_PARTY


@pytest.mark.parametrize("separators", [(", ", ":"), (",", ": ")])
def test_06_the_manifest_respaced(separators: tuple[str, str], stage: Stage) -> None:
    path = stage.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True, separators=separators))
    assert refusal(stage.path) is Outcome.SIGNATURE_WRONG
    stage.sign("vendor")  # whoever signs it: there is one encoding
    assert refusal(stage.path) is Outcome.MANIFEST_MALFORMED


def test_06_the_manifest_reordered(stage: Stage) -> None:
    path = stage.path / "manifest.json"
    listed = dict(reversed(json.loads(path.read_bytes()).items()))
    path.write_text(json.dumps(listed, separators=(",", ":")))
    assert refusal(stage.path) is Outcome.SIGNATURE_WRONG
    stage.sign("vendor")
    assert refusal(stage.path) is Outcome.MANIFEST_MALFORMED


def test_07_chunks_swapped_within_a_tensor(stage: Stage) -> None:
    stage.edit(lambda raw: swap(raw, chunks_at(raw), chunks_at(raw) + STEP, STEP))
    assert refusal(stage.path) is Outcome.CHUNK_WRONG


def test_08_chunks_swapped_between_tensors(stage: Stage) -> None:
    """The first tensor's first chunk and the second tensor's only one, both full."""
    second = 3 * STEP + 100 + 16
    stage.edit(lambda raw: swap(raw, chunks_at(raw), chunks_at(raw) + second, STEP))
    assert refusal(stage.path) is Outcome.CHUNK_WRONG


def test_07_08_with_the_index_swapped_along(stage: Stage) -> None:
    def edit(raw: bytearray) -> None:
        swap(raw, chunks_at(raw), chunks_at(raw) + STEP, STEP)
        swap(raw, 64 + 32, 64 + 64, 32)

    stage.edit(edit)
    assert refusal(stage.path) is Outcome.INDEX_WRONG


def test_09_a_chunk_from_another_file_of_the_package(stage: Stage) -> None:
    tokenizer = stage.file("tokenizer.json").read_bytes()
    stolen = tokenizer[-(2 * STEP + 7 + 16) :][:STEP]
    stage.edit(lambda raw: raw.__setitem__(slice(chunks_at(raw), chunks_at(raw) + STEP), stolen))
    assert refusal(stage.path) is Outcome.CHUNK_WRONG


def test_09_two_files_of_the_package_in_each_others_place(stage: Stage) -> None:
    one, other = stage.file("config.json"), stage.file("chat_template.jinja")
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])
    assert refusal(stage.path) is Outcome.SIZE_WRONG


def test_10_a_chunk_from_another_package_under_the_same_data_key(stage: Stage) -> None:
    (entry,) = [entry for entry in stage.other_made.files if entry.name == "model.safetensors"]
    foreign = (stage.other / entry.stored_name).read_bytes()

    def edit(raw: bytearray) -> None:
        place = chunks_at(raw)
        raw[place : place + STEP] = foreign[place : place + STEP]

    stage.edit(edit)
    assert refusal(stage.path) is Outcome.CHUNK_WRONG


def test_10_a_whole_file_from_another_package_under_the_same_data_key(stage: Stage) -> None:
    (entry,) = [entry for entry in stage.other_made.files if entry.name == "model.safetensors"]
    shutil.copy(stage.other / entry.stored_name, stage.file())
    assert refusal(stage.path) is Outcome.HEADER_MISMATCH


def test_11_the_last_chunk_dropped(stage: Stage) -> None:
    stage.edit(lambda raw: raw.__delitem__(slice(-16, None)))  # the empty tensor's: a tag alone
    assert refusal(stage.path) is Outcome.SIZE_WRONG


def test_12_a_file_cut_within_a_chunk(stage: Stage) -> None:
    stage.edit(lambda raw: raw.__delitem__(slice(-100, None)))
    assert refusal(stage.path) is Outcome.SIZE_WRONG


def test_13_bytes_appended(stage: Stage) -> None:
    stage.edit(lambda raw: raw.extend(b"\0"))
    assert refusal(stage.path) is Outcome.SIZE_WRONG


def test_14_a_segments_length_edited(stage: Stage) -> None:
    """Of the first, in the header; the others stand in the sealed table, whose every bit is covered."""
    stage.edit(lambda raw: raw.__setitem__(48, raw[48] ^ 1))
    assert refusal(stage.path) is Outcome.INDEX_WRONG
    stage.edit(lambda raw: raw.__setitem__(48, raw[48] ^ 1))
    stage.edit(lambda raw: raw.__setitem__(chunks_at(raw) - 60, raw[chunks_at(raw) - 60] ^ 1))
    assert refusal(stage.path) is Outcome.CHUNK_WRONG


def test_15_the_most_segments_a_header_can_claim(stage: Stage) -> None:
    stage.set(40, b"\xff" * 4)
    assert refusal(stage.path) is Outcome.HEADER_OUT_OF_BOUNDS


def test_16_a_table_of_2_to_the_63_bytes(stage: Stage) -> None:
    stage.set(48, (2**63).to_bytes(8, "little"))
    assert refusal(stage.path) is Outcome.HEADER_OUT_OF_BOUNDS


@pytest.mark.parametrize("log2_chunk", [0, 63, 255])
def test_17_chunks_of_1_byte_and_of_8_exbibytes(log2_chunk: int, stage: Stage) -> None:
    stage.set(7, bytes([log2_chunk]))
    assert refusal(stage.path) is Outcome.CHUNK_SIZE_UNSUPPORTED


@pytest.mark.parametrize("suite", [0, 2, 255])
def test_18_an_unknown_suite(suite: int, stage: Stage) -> None:
    stage.set(6, bytes([suite]))
    assert refusal(stage.path) is Outcome.SUITE_UNSUPPORTED


def test_19_the_wrong_key(stage: Stage) -> None:
    assert refusal(stage.path, data_key="another") is Outcome.KEY_WRONG


def test_20_an_older_epoch_replayed(stage: Stage) -> None:
    """The signature is good and the key is right: only the floor tells."""
    assert refusal(stage.path, min_epoch=stage.made.epoch) is Outcome.OPENED
    assert refusal(stage.path, min_epoch=stage.made.epoch + 1) is Outcome.EPOCH_TOO_OLD


def test_21_an_adapter_for_another_base(stage: Stage, tmp_path: Path) -> None:
    files = making.model(tmp_path / "plain", seed=3)
    making.seal(files, tmp_path / "adapter", Owner.CUSTOMER, "customer data", base=stage.made.as_base)
    given = {"data_key": "customer data", "owner": Owner.CUSTOMER}
    assert refusal(tmp_path / "adapter", base=stage.made.as_base, **given) is Outcome.OPENED
    assert refusal(tmp_path / "adapter", base=stage.other_made.as_base, **given) is Outcome.BASE_WRONG


@pytest.mark.parametrize(
    "names",
    [
        ("../config.json",),
        ("a/../../config.json",),
        ("/etc/passwd",),
        ("config.json", "config.json"),
        ("config.json", "CONFIG.json"),
        ("folder", "folder/file"),
    ],
)
def test_22_names_that_climb_clash_or_repeat(names: tuple[str, ...], stage: Stage) -> None:
    stage.rename_in_manifest(*names)
    assert refusal(stage.path) is Outcome.NAME_REFUSED


def test_22_a_link_in_a_sealed_files_place(stage: Stage, tmp_path: Path) -> None:
    """Even one to the very bytes: what a link points to can change between two looks."""
    shutil.move(stage.file(), tmp_path / "elsewhere")
    stage.file().symlink_to(tmp_path / "elsewhere")
    assert refusal(stage.path) is Outcome.NOT_A_REGULAR_FILE
