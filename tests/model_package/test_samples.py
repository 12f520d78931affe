"""Packages of every released version stay in the tree for ever, and open.

Each folder of `samples/` was sealed once, by the software of its time and with fresh random ids, and is never
written again. `sample.json` beside the package holds its key, which guards nothing else, and what it unseals
to.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_package import recipients
from model_package.layout import FORMAT
from model_package.opener import Trust, open_package
from model_package.recipients import Owner
from model_package.signature import Root, Roots
from tests.model_package import independent_reader, making

FOLDER = Path(__file__).parent / "samples"
NAMES = sorted(path.name for path in FOLDER.iterdir())


def known(name: str) -> dict[str, Any]:
    loaded = json.loads((FOLDER / name / "sample.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def digests(content: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def test_the_present_format_has_a_sample() -> None:
    assert f"format-{FORMAT}" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_opens_to_what_was_sealed(name: str) -> None:
    sample = known(name)
    root = Root(bytes.fromhex(sample["root"]))
    trust = Trust(Owner.VENDOR, Roots(vendor=(root,)), sample["now_s"])
    for threads in (1, 2):
        with open_package(FOLDER / name / "package", trust) as package:
            package.prove_whole()
            private = bytearray.fromhex(sample["recipient_key"])
            data_key = recipients.unwrap(package.manifest.recipients, private, package.manifest.key_context)
            with package.unlock(data_key, threads) as contents:
                assert digests(making.read_all(contents)) == sample["content"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_opens_in_the_independent_reader(name: str) -> None:
    sample = known(name)
    given = SimpleNamespace(
        owner="vendor",
        roots=[("vendor", sample["root"], None)],
        now_s=sample["now_s"],
        min_epoch=0,
        base=None,
        data_key=None,
        recipient_key=bytes.fromhex(sample["recipient_key"]),
    )
    outcome, content = independent_reader.read(FOLDER / name / "package", given)
    assert outcome == "opened"
    assert digests(content) == sample["content"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_what_it_was_when_it_was_made(name: str) -> None:
    """A sample made again would prove nothing about packages already shipped."""
    sample = known(name)
    stored = {path.name: path.read_bytes() for path in (FOLDER / name / "package").iterdir()}
    assert digests(stored) == sample["stored"]
