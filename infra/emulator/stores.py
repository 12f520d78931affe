"""Where objects of asynchronous calls and batch jobs lie: a folder that stands for S3, or any S3.

Owns: locations, reading, writing, listing. Must not know: requests, jobs, what an object holds.
Invariant: a key of a location never leads out of the folder; an object is seen whole or not at all.

    s3://BUCKET/KEY    FolderStore: ROOT/BUCKET/KEY       S3Store: that object, through a client of boto3
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

OBJECT_BYTES: Final = 1024**3  # largest input of an asynchronous call
_LOCATION: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.*)")


class ObjectMissing(Exception):
    """There is no such object, or it cannot be read; the message holds no location."""


class Store(Protocol):
    """What holds objects. Locations are `s3://BUCKET/KEY`; all methods raise ObjectMissing."""

    def read(self, location: str, limit_bytes: int = OBJECT_BYTES) -> bytes:
        """Return an object of at most `limit_bytes`."""

    def write(self, location: str, data: bytes, content_type: str) -> None:
        """Put an object, replacing one of that name."""

    def list(self, location: str) -> list[str]:
        """Return the locations of the objects whose name begins with `location`, sorted."""


def parse(location: str) -> tuple[str, str]:
    """Return bucket and key; raises ObjectMissing for what is no location."""
    match = _LOCATION.fullmatch(location)
    if match is None:
        raise ObjectMissing("a location must be s3://BUCKET/KEY")
    return match[1], match[2]


def join(location: str, *parts: str) -> str:
    """Return the location of `parts` under `location`."""
    return "/".join((location.rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))))


class FolderStore:
    """Objects as files under `root`, bucket by bucket."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def read(self, location: str, limit_bytes: int = OBJECT_BYTES) -> bytes:
        path = self._path(location)
        try:
            with path.open("rb") as file:
                data = file.read(limit_bytes + 1)
        except OSError as error:
            raise ObjectMissing("there is no such object") from error
        if len(data) > limit_bytes:
            raise ObjectMissing(f"the object is larger than {limit_bytes} bytes")
        return data

    def write(self, location: str, data: bytes, content_type: str) -> None:  # noqa: ARG002  files have none
        path = self._path(location)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except OSError as error:
            raise ObjectMissing("the object cannot be written") from error

    def list(self, location: str) -> list[str]:
        bucket, prefix = parse(location)
        top = self._root / bucket
        files = (file for file in top.rglob("*") if file.is_file() and not file.name.startswith(".part-"))
        keys = sorted(file.relative_to(top).as_posix() for file in files)
        return [f"s3://{bucket}/{key}" for key in keys if key.startswith(prefix)]

    def _path(self, location: str) -> Path:
        bucket, key = parse(location)
        path = (self._root / bucket / key).resolve()
        if not key or not path.is_relative_to(self._root / bucket) or path == self._root / bucket:
            raise ObjectMissing("a key must name an object in its bucket")
        return path


class S3Store:
    """Objects in any S3; `client` is boto3's. Its errors become ObjectMissing, without their text."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def read(self, location: str, limit_bytes: int = OBJECT_BYTES) -> bytes:
        bucket, key = parse(location)
        answer = _reached(lambda: self._client.get_object(Bucket=bucket, Key=key))
        if answer["ContentLength"] > limit_bytes:
            answer["Body"].close()
            raise ObjectMissing(f"the object is larger than {limit_bytes} bytes")
        data: bytes = _reached(answer["Body"].read)
        return data

    def write(self, location: str, data: bytes, content_type: str) -> None:
        bucket, key = parse(location)
        _reached(lambda: self._client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=content_type))

    def list(self, location: str) -> list[str]:
        bucket, prefix = parse(location)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        held = _reached(lambda: [entry for page in pages for entry in page.get("Contents", ())])
        return sorted(f"s3://{bucket}/{entry['Key']}" for entry in held)


def _reached(call: Callable[[], Any]) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call()
    except (BotoCoreError, ClientError) as error:
        raise ObjectMissing("the store refused") from error
