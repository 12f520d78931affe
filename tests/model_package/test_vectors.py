"""Every vector has its one outcome: here, and in a reader written from FORMAT.md alone."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

import pytest

from model_package import outcome as outcomes
from model_package import recipients
from model_package.manifest import Base
from model_package.opener import Package, Trust, open_package
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from model_package.signature import Root, Roots
from tests.model_package import independent_reader, making
from tests.model_package.make_vectors import FOLDER, SUFFIX, all_vectors
from tests.model_package.vector_file import Vector, dump, parse

NAMES = sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))
FORMAT = Path(outcomes.__file__).parent / "FORMAT.md"
# Outcomes that a file cannot show: of the system, or too large to keep.
ELSEWHERE = {Outcome.UNREADABLE: "test_opener.py", Outcome.MANIFEST_OVERSIZED: "test_opener.py"}


def load(name: str) -> Vector:
    return parse((FOLDER / f"{name}{SUFFIX}").read_bytes())


def read(directory: Path, vector: Vector) -> tuple[str, dict[str, bytes]]:
    """Read a package as the product does; return the outcome and the unsealed files."""
    roots = {
        owner: tuple(Root(bytes.fromhex(key), until) for of, key, until in vector.roots if of == owner)
        for owner in ("vendor", "customer")
    }
    base = Base(vector.base[1], vector.base[0]) if vector.base else None
    trust = Trust(Owner(vector.owner), Roots(**roots), vector.now_s, vector.min_epoch, base)
    try:
        package = open_package(directory, trust)
        with package, package.unlock(data_key(package, vector)) as contents:
            return Outcome.OPENED, making.read_all(contents)
    except PackageError as error:
        return error.outcome, {}


def data_key(package: Package, vector: Vector) -> bytearray:
    if vector.recipient_key is None:
        assert vector.data_key is not None
        return bytearray(vector.data_key)
    listed = package.manifest
    return recipients.unwrap(listed.recipients, bytearray(vector.recipient_key), listed.key_context)


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_has_its_outcome(name: str, tmp_path: Path) -> None:
    vector = load(name)
    directory = vector.lay_out(tmp_path / "package")
    outcome, content = read(directory, vector)
    assert outcome == vector.outcome
    assert {each: hashlib.sha256(data).hexdigest() for each, data in content.items()} == vector.content


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_written_from_the_document_agrees(name: str, tmp_path: Path) -> None:
    vector = load(name)
    directory = vector.lay_out(tmp_path / "package")
    outcome, content = independent_reader.read(directory, vector)
    assert outcome == vector.outcome
    assert {each: hashlib.sha256(data).hexdigest() for each, data in content.items()} == vector.content


def test_the_other_reader_is_short_and_knows_nothing_of_ours() -> None:
    text = Path(independent_reader.__file__).read_text(encoding="utf-8")
    assert sum(1 for line in text.splitlines() if line.strip()) <= 200
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in {"model_package", "tests", "msgspec"} for name in modules)


def test_making_the_vectors_again_gives_the_same_bytes() -> None:
    made = all_vectors()
    assert sorted(made) == NAMES
    for name, vector in made.items():
        assert dump(vector) == (FOLDER / f"{name}{SUFFIX}").read_bytes(), name


def test_every_outcome_of_the_document_has_a_vector_and_no_other_exists() -> None:
    table = FORMAT.read_text(encoding="utf-8").split("## 9. Outcomes")[1].split("## 10.")[0]
    documented = re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)
    assert documented == [outcome.value for outcome in Outcome]
    shown = {load(name).outcome for name in NAMES}
    assert shown | set(ELSEWHERE) == set(documented)
    for outcome, file in ELSEWHERE.items():
        assert f"Outcome.{outcome.name}" in (FORMAT.parents[1] / "tests/model_package" / file).read_text()


def test_a_failed_seal_says_no_more_than_its_outcome() -> None:
    """Every outcome has words of its own, in the form of all errors, and no room for content."""
    assert set(outcomes.WORDS) == set(Outcome) - {Outcome.OPENED}
    for outcome in outcomes.WORDS:
        message, hint = str(PackageError(outcome)).split("\nhint: ")
        assert message[0].islower() or message[0] == "`"
        assert not message.endswith(".") and not hint.endswith(".")
    assert str(PackageError(Outcome.CHUNK_WRONG)).splitlines()[0] == "corrupted or tampered with"
