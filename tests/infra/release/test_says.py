"""What a release says of its image: bills of materials, provenance, advisories."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

from infra.image import advisories, archive
from infra.image.subject import SITE, Image
from infra.release import bills, components, files, make, openssl, provenance, verify
from infra.release.files import ReleaseRefused
from infra.release.openssl import SigningRefused
from tests.infra.release.releases import read, release_in, signed_again
from tests.infra.tiny_image import CREATED, EPOCH_S, File, TinyImage


def test_a_package_below_the_advisories_stops_making_and_verifying(
    release: Path, vendor: Path, key: Path, tmp_path: Path
) -> None:
    old = TinyImage()
    old.files[f"{SITE}/flask-3.1.3.dist-info/METADATA"] = File(
        b"Name: gunicorn\nVersion: 22.0\nLicense: MIT\n"
    )
    with pytest.raises(ReleaseRefused, match=r"`gunicorn==22.0` is below 23.0 \(CVE-2024-1135"):
        release_in(tmp_path / "old", key, old)
    floors = read(release / files.ADVISORIES)
    floors["packages"]["flask"] = {"floor": "3.2", "ids": ["CVE-0000-0001"], "why": "a test"}
    (release / files.ADVISORIES).write_text(json.dumps(floors))
    signed_again(release, key, lambda _: None)
    with pytest.raises(ReleaseRefused, match=r"`Flask==3.1.3` is below 3.2 \(CVE-0000-0001\)"):
        verify.verify(release, vendor, None)


def test_the_customer_s_own_advisories_count_too(
    release: Path, vendor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = {"packages": {"flask": {"floor": "4", "ids": [], "why": "found since"}}}
    monkeypatch.setattr(advisories, "pinned", lambda: newer)
    with pytest.raises(ReleaseRefused, match="found since"):
        verify.verify(release, vendor, None)


@pytest.mark.parametrize(
    ("version", "floor", "below"),
    [
        ("3.1.3", "3.1.3", False),
        ("3.1.10", "3.1.9", False),
        ("3.1", "3.1.0", False),
        ("3.0.9", "3.1", True),
        ("2.13.0+cpu", "2.13", False),
        ("2.9.1+cpu", "2.10", True),
        ("2.10.0rc1", "2.10", True),
        ("2.10.0.dev3", "2.10", True),
        ("2.10.0.post1", "2.10", False),
        ("nightly", "1", True),
    ],
)
def test_versions_are_compared_as_numbers_and_a_pre_release_is_below(
    version: str, floor: str, below: bool
) -> None:
    document = {"packages": {"some-package": {"floor": floor, "ids": [], "why": "w"}}}
    assert bool(advisories.below([f"Some_Package=={version}"], document)) is below


def test_the_pinned_advisories_are_complete_entries() -> None:
    document = advisories.pinned()
    assert {"gunicorn", "werkzeug", "jinja2", "h11", "cryptography", "torch"} <= document["packages"].keys()
    for entry in document["packages"].values():
        assert entry["why"] and all(one.startswith(("CVE-", "GHSA-", "PYSEC-")) for one in entry["ids"])


def test_no_code_of_the_image_reads_an_archive_as_the_advisories_say() -> None:
    said = advisories.pinned()["not_reached"]["tarfile"]
    assert "CVE-2025-4517" in said["ids"]
    for room in ("container", "sagemaker_entry", "model_package"):
        for path in (make.build.ROOT / room).rglob("*.py"):
            text = path.read_text()
            assert "zipfile" not in text and "unpack_archive" not in text, path
            opened = text.count("tarfile.open(")
            assert opened == text.count('mode="w|"'), f"{path} opens an archive to read it"


def test_both_bills_name_every_component_and_no_other(made: Path) -> None:
    with Image(made / files.ARCHIVE) as image:
        there = {one.purl for one in components.components(image)}
    assert there == {
        "pkg:pypi/flask@3.1.3",
        "pkg:deb/debian/python3.11@3.11?arch=amd64&distro=debian-12",
    }
    for form in (files.CYCLONEDX, files.SPDX):
        assert bills.purls_of(read(made / form)) == there


def test_the_bills_have_what_their_forms_ask_for(made: Path) -> None:
    one = read(made / files.CYCLONEDX)
    assert (one["bomFormat"], one["specVersion"], one["version"]) == ("CycloneDX", "1.6", 1)
    assert one["metadata"]["timestamp"] == CREATED
    references = [part["bom-ref"] for part in one["components"]]
    assert len(set(references)) == len(references)
    assert one["dependencies"][0]["dependsOn"] == references
    assert {"name": "BSD"} in [
        entry["license"] for part in one["components"] for entry in part.get("licenses", ())
    ]
    other = read(made / files.SPDX)
    assert (other["spdxVersion"], other["dataLicense"]) == ("SPDX-2.3", "CC0-1.0")
    known = {part["SPDXID"] for part in other["packages"]} | {"SPDXRef-DOCUMENT"}
    assert len(known) == len(other["packages"]) + 1
    for relation in other["relationships"]:
        assert {relation["spdxElementId"], relation["relatedSpdxElement"]} <= known
    contained = [r for r in other["relationships"] if r["relationshipType"] == "CONTAINS"]
    assert len(contained) == len(other["packages"]) - 1


@pytest.mark.parametrize(
    ("name", "version", "purl"),
    [
        ("Foo_Bar.baz", "1.0+cpu", "pkg:pypi/foo-bar-baz@1.0%2Bcpu"),
        ("flask", "1!2.0", "pkg:pypi/flask@1%212.0"),
    ],
)
def test_package_urls_are_encoded(tmp_path: Path, name: str, version: str, purl: str) -> None:
    tiny = TinyImage()
    text = f"Name: {name}\nVersion: {version}\nLicense-Expression: MIT OR Apache-2.0\n"
    tiny.files[f"{SITE}/flask-3.1.3.dist-info/METADATA"] = File(text.encode())
    with Image(tiny.save(tmp_path / "image.tar")) as image:
        found = [one for one in components.components(image) if one.kind == "pypi"]
    assert [(one.purl, one.licence) for one in found] == [(purl, "MIT OR Apache-2.0")]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("usr/lib/libstray.so", "1 files are no component's"),
        (f"{SITE}/stray-1.0.dist-info/RECORD", "no metadata in stray-1.0.dist-info"),
    ],
)
def test_what_belongs_to_no_component_stops_the_release(
    tmp_path: Path, key: Path, path: str, said: str
) -> None:
    tiny = TinyImage()
    tiny.files[path] = File(b"x")
    with pytest.raises(ReleaseRefused, match=said):
        release_in(tmp_path / "release", key, tiny)


def test_a_component_that_is_listed_and_not_there_stops_the_release(tmp_path: Path, key: Path) -> None:
    tiny = TinyImage()
    del tiny.files["usr/bin/python3.11"]
    with pytest.raises(ReleaseRefused, match="is listed and not there"):
        release_in(tmp_path / "release", key, tiny)


def test_the_provenance_is_a_signed_in_toto_statement_of_this_image(made: Path, vendor: Path) -> None:
    envelope = read(made / files.PROVENANCE)
    said = provenance.open_sealed(envelope, lambda text, by: openssl.verify(vendor, text, by))
    assert said["subject"][0]["digest"]["sha256"] == archive.identify(made / files.ARCHIVE).image_id[7:]
    definition = said["predicate"]["buildDefinition"]
    wheel = {
        "uri": "wheel:flask-3.1.3-py3-none-any.whl",
        "digest": {"sha256": hashlib.sha256(b"wheel").hexdigest()},
    }
    assert wheel in definition["resolvedDependencies"]
    assert definition["internalParameters"]["SOURCE_DATE_EPOCH"] == EPOCH_S
    assert envelope["signatures"][0]["keyid"] == openssl.fingerprint(vendor)


def test_the_envelope_s_encoding_is_the_specification_s() -> None:
    # the example of the protocol's page
    assert provenance.encoded("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@pytest.mark.parametrize("fault", ["payload", "type", "none", "of another image"])
def test_a_provenance_that_was_changed_is_refused(release: Path, vendor: Path, key: Path, fault: str) -> None:
    envelope = read(release / files.PROVENANCE)
    if fault == "payload":
        envelope["payload"] = base64.b64encode(b"{}").decode()
    elif fault == "type":
        envelope["payloadType"] = "text/plain"
    elif fault == "none":
        envelope["signatures"] = []
    else:
        said = json.loads(base64.b64decode(envelope["payload"]))
        said["subject"][0]["digest"]["sha256"] = "0" * 64
        envelope = provenance.seal(said, "k", lambda text: openssl.sign(key, text))
    (release / files.PROVENANCE).write_text(json.dumps(envelope))
    signed_again(release, key, lambda _: None)
    with pytest.raises((ReleaseRefused, SigningRefused), match=r"provenance|signature does not hold"):
        verify.verify(release, vendor, None)


@pytest.mark.parametrize("label", make.LABELS)
def test_an_image_that_does_not_say_where_it_comes_from_is_not_released(
    tmp_path: Path, key: Path, label: str
) -> None:
    tiny = TinyImage()
    del tiny.config["Labels"][label]
    with pytest.raises(ReleaseRefused, match=f"has no label `{label}`"):
        release_in(tmp_path / "release", key, tiny)


def test_a_provenance_of_another_form_is_refused_though_it_is_signed(
    release: Path, vendor: Path, key: Path
) -> None:
    said = {"_type": provenance.STATEMENT_TYPE, "predicateType": provenance.PREDICATE_TYPE, "subject": [1]}
    envelope = provenance.seal(said, "k", lambda text: openssl.sign(key, text))
    (release / files.PROVENANCE).write_text(json.dumps(envelope))
    signed_again(release, key, lambda _: None)
    with pytest.raises(ReleaseRefused, match="of another form"):
        verify.verify(release, vendor, None)
