"""A listing's folder: it passes as it was built, and with anything changed, missing or added it does not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.marketplace import folder, samples
from infra.report import CommandError, ExitCode
from tests.infra.marketplace import making

REQUEST = "requests/us-east-1.json"
Found = dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("listing") / "out"
    facts, files = making.facts()
    assert folder.write(out, facts, files)["ok"]
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def refused(result: Found) -> list[str]:
    return [f"{one['where']}: {one['detail']}" for one in result["findings"] if one["state"] == "refused"]


def test_a_built_folder_passes_and_tells_what_was_not_measured_on_the_instance(built: Path) -> None:
    result = folder.check(built)
    assert result["ok"] and not refused(result)
    assert any("no figures were measured on `ml.g6.xlarge`" in one["detail"] for one in result["findings"])
    names = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert {REQUEST, "arn_map.json", "description.md", "usage.md", "EULA.md", *samples.FILES} <= names


def leaves(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(document, dict):
        return [leaf for name, held in document.items() for leaf in leaves(held, (*path, name))]
    if isinstance(document, list):
        return [leaf for index, held in enumerate(document) for leaf in leaves(held, (*path, index))]
    return [path]


def test_a_changed_value_in_any_field_of_a_request_is_named(copy: Path) -> None:
    right = (copy / REQUEST).read_text(encoding="utf-8")
    paths = leaves(json.loads(right))
    assert len(paths) > 30
    for path in paths:
        wrong = json.loads(right)
        held = wrong
        for step in path[:-1]:
            held = held[step]
        held[path[-1]] = 7 if isinstance(held[path[-1]], str) else "planted"
        (copy / REQUEST).write_text(json.dumps(wrong), encoding="utf-8")
        name = ".".join(map(str, path))
        assert f"{REQUEST}: `{name}` differs from what `listing.json` gives" in refused(folder.check(copy))


def test_a_request_with_a_value_that_aws_refuses_says_so_too(copy: Path) -> None:
    wrong = json.loads((copy / REQUEST).read_text(encoding="utf-8"))
    wrong["InferenceSpecification"]["SupportedTransformInstanceTypes"] = ["ml.g99.large"]
    del wrong["CertifyForMarketplace"]
    (copy / REQUEST).write_text(json.dumps(wrong), encoding="utf-8")
    found = refused(folder.check(copy))
    assert any("enum value set" in fault for fault in found)
    assert any("`CertifyForMarketplace` must be true" in fault for fault in found)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_request_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / REQUEST).write_text(text, encoding="utf-8")
    assert refused(folder.check(copy)) == [f"{REQUEST}: the request is no JSON object"]


def test_every_file_is_held_to_its_bytes(built: Path, copy: Path) -> None:
    names = [path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()]
    for name in sorted(set(names) - {folder.FACTS}):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b" ")
        assert any(name in fault for fault in refused(folder.check(copy))) or name.startswith("requests/")
        (copy / name).unlink()
        found = refused(folder.check(copy))
        assert any(name in fault and "missing" in fault for fault in found), name
        (copy / name).write_bytes(before)
    assert folder.check(copy)["ok"]


def test_a_file_that_does_not_belong_is_named(copy: Path) -> None:
    (copy / "notes.txt").write_text("internal", encoding="utf-8")
    assert refused(folder.check(copy)) == ["notes.txt: the file is not a part of a listing"]


def test_a_link_is_not_followed(copy: Path, tmp_path: Path) -> None:
    (copy / "link").symlink_to(tmp_path)
    with pytest.raises(CommandError, match="no_listing"):
        folder.check(copy)


def test_a_folder_without_facts_or_with_wrong_ones_is_no_listing(copy: Path) -> None:
    facts = json.loads((copy / folder.FACTS).read_text(encoding="utf-8"))
    facts["vendor"]["product"]["title"] = ""
    (copy / folder.FACTS).write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(CommandError) as caught:
        folder.check(copy)
    assert "$.vendor.product.title" in caught.value.message
    (copy / folder.FACTS).unlink()
    with pytest.raises(CommandError) as caught:
        folder.check(copy)
    assert caught.value.code == ExitCode.USAGE


def test_a_folder_of_another_format_is_refused(copy: Path) -> None:
    facts = json.loads((copy / folder.FACTS).read_text(encoding="utf-8"))
    (copy / folder.FACTS).write_text(json.dumps(facts | {"format": 2}), encoding="utf-8")
    assert any("`format` is 2" in fault for fault in refused(folder.check(copy)))


def test_a_changed_figure_is_seen_in_the_pages(copy: Path) -> None:
    text = (copy / folder.FACTS).read_text(encoding="utf-8")
    facts = json.loads(text)
    facts["speeds"][0]["figures"]["output_tok_s"] *= 2
    (copy / folder.FACTS).write_text(json.dumps(facts), encoding="utf-8")
    assert refused(folder.check(copy)) == ["description.md: the file differs from what `listing.json` gives"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (samples.REALTIME_OUTPUT, b"text", "is no JSON document"),
        (samples.BATCH_OUTPUT, b'{}\n{"a"\n{}\n', "line 2 is no JSON document"),
        (samples.BATCH_OUTPUT, b"{}\n", "has not one line for each line"),
        (samples.STREAM_OUTPUT, b"data: {}\n\n", "does not end as a stream does"),
    ],
)
def test_a_sample_that_is_no_answer_is_refused_even_when_it_was_recorded(
    name: str, data: bytes, words: str
) -> None:
    facts, files = making.facts()
    files[name] = data
    held = {**facts.recording.sha256, name: hashlib.sha256(data).hexdigest()}
    changed = msgspec.structs.replace(facts.recording, sha256=held)
    assert any(words in fault for fault in samples.faults(changed, files))
    assert samples.faults(facts.recording, files) == [f"`{name}` is not what was recorded"]


def test_nothing_is_written_for_a_product_that_would_not_pass(tmp_path: Path) -> None:
    facts, files = making.facts(making.words(image__user="0"))
    with pytest.raises(CommandError) as caught:
        folder.write(tmp_path / "out", facts, files)
    assert "`image.user` is root" in caught.value.message and not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    facts, files = making.facts()
    (tmp_path / "out").mkdir()
    with pytest.raises(CommandError, match="bad_argument"):
        folder.write(tmp_path / "out", facts, files)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("page", "change", "words"),
    [
        (
            "pricing.md",
            {"pricing": {"kind": "inference", "unit": "an answer"}},
            "dimension `inference.count`",
        ),
        ("pricing.md", {}, "Free trial: 14 days"),
        ("instances.md", {"image__cuda": "none"}, "computes on the CPU"),
        ("instances.md", {}, "`al2-ami-sagemaker-inference-gpu-2-1` or later"),
        ("EULA.md", {}, "Standard Contract"),
        ("description.md", {}, "| W3 | strongroom int8-block http | 136 | 5.54 |"),
        ("description.md", {}, "a machine that is no SageMaker instance"),
        (
            "regions.md",
            {},
            "arn:aws:sagemaker:us-east-2:057799348421:model-package/strongroom-example-chat-1-0-0",
        ),
    ],
)
def test_the_pages_say_what_the_facts_are(page: str, change: dict[str, Any], words: str) -> None:
    facts, _ = making.facts(making.words(**change))
    assert words in folder.derived(facts)[page].decode()


def test_own_terms_stand_in_the_folder_as_they_are() -> None:
    facts, _ = making.facts(making.words(eula="EULA.txt"))
    own = msgspec.structs.replace(facts, terms="Our terms.")
    assert folder.derived(own)["EULA.md"] == b"Our terms.\n"
    none = msgspec.structs.replace(facts, quality=None)
    assert b"No quality figures" in folder.derived(none)["description.md"]


Change = Callable[[Any], None]


@pytest.mark.parametrize(
    ("one", "other", "paths"),
    [
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a.1"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a"]),
        ({"a": 1}, {"a": True}, ["a"]),
        ({"a": {"b": 1}}, {"a": {"c": 1}}, ["a.b", "a.c"]),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_differences_are_named_by_their_path(one: Any, other: Any, paths: list[str]) -> None:
    assert list(folder.differences(one, other)) == paths
