"""Objects in a folder and in S3 behave alike, and no key leads out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from infra.emulator.stores import FolderStore, ObjectMissing, S3Store, Store, join, parse


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        yield FolderStore(tmp_path)
        return
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y")
        client.create_bucket(Bucket="bucket")
        yield S3Store(client)
        client.close()


def test_what_is_written_is_read_and_listed_by_prefix(store: Store) -> None:
    for key in ("in/b.json", "in/a.json", "in/sub/c.json", "other.json"):
        store.write(f"s3://bucket/{key}", key.encode(), "application/json")
    assert store.read("s3://bucket/in/a.json") == b"in/a.json"
    listed = ["s3://bucket/in/a.json", "s3://bucket/in/b.json", "s3://bucket/in/sub/c.json"]
    assert store.list("s3://bucket/in/") == listed
    assert store.list("s3://bucket/in/a") == listed[:1]
    assert store.list("s3://bucket/none") == []


def test_an_object_at_the_limit_is_read_and_one_byte_more_is_refused(store: Store) -> None:
    store.write("s3://bucket/k", b"12345", "text/plain")
    assert store.read("s3://bucket/k", 5) == b"12345"
    with pytest.raises(ObjectMissing, match="larger than 4"):
        store.read("s3://bucket/k", 4)


def test_what_is_not_there_is_one_error_without_a_location(store: Store) -> None:
    for call in (lambda: store.read("s3://bucket/none"), lambda: store.read("s3://nobody/none")):
        with pytest.raises(ObjectMissing) as caught:
            call()
        assert "none" not in str(caught.value)


@pytest.mark.parametrize(
    "location", ["", "bucket/k", "https://bucket/k", "s3://bucket", "s3://B/k", "s3://../k", "s3://b/k"]
)
def test_what_is_no_location_is_refused(location: str) -> None:
    with pytest.raises(ObjectMissing):
        parse(location)


@pytest.mark.parametrize("key", ["", "..", "../other/k", "a/../../other/k", "/etc/passwd"])
def test_a_key_never_leads_out_of_its_bucket(tmp_path: Path, key: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k").write_bytes(b"secret")
    store = FolderStore(tmp_path)
    with pytest.raises(ObjectMissing):
        store.read(f"s3://bucket/{key}")
    with pytest.raises(ObjectMissing):
        store.write(f"s3://bucket/{key}", b"", "text/plain")


def test_parts_are_joined_with_one_slash() -> None:
    assert join("s3://b/out/", "/x/", "", "k") == "s3://b/out/x/k"
