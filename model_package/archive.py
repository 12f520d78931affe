"""A package as one `model.tar.gz`, the form in which SageMaker lays a model out at /opt/ml/model.

Owns: which files go in, their order and headers. Must not know: keys, what is sealed.
Invariant: exactly the package's own files and documents, the manifest last; the same package gives the same
bytes.

Sealed bytes do not compress: gzip's level 0 stores them, so that packing runs as fast as copying.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from model_package import beside, storage
from model_package.manifest import Manifest
from model_package.opener import MANIFEST_NAME, SIGNATURE_NAME
from model_package.outcome import Outcome
from model_package.sealing import SealError

MODE: Final = 0o644  # nothing in it is secret, and whoever unpacks it may be another user


def write(
    package: Path, manifest: Manifest, out: Path, progress: Callable[[int], None] = lambda _: None
) -> int:
    """Write the package in the directory `package` to the new file `out`; return its size.

    `manifest` is the package's, verified. `progress` gets bytes packed since the last call. Raises SealError,
    PackageError, OSError.
    """
    if out.exists():
        raise SealError("the archive exists already")
    documents = [name for name in beside.NAMES if (package / name).is_file()]
    names = [*(entry.stored_name for entry in manifest.files), *documents, SIGNATURE_NAME, MANIFEST_NAME]
    out.parent.mkdir(parents=True, exist_ok=True)
    source = storage.open_directory(package)
    target = storage.open_directory(out.parent)
    try:
        with storage.completed(target, out.name) as fd, os.fdopen(os.dup(fd), "wb") as raw:
            with (
                gzip.GzipFile("", "wb", compresslevel=0, fileobj=raw, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
            ):
                for name in names:
                    progress(_add(archive, source, name))
            raw.flush()
            size = storage.size_of(fd)
    finally:
        os.close(target)
        os.close(source)
    return size


def _add(archive: tarfile.TarFile, directory: int, name: str) -> int:
    fd = storage.open_regular(directory, name, Outcome.FILE_MISSING)
    with os.fdopen(fd, "rb") as file:
        header = tarfile.TarInfo(name)
        header.size, header.mode = storage.size_of(fd), MODE
        archive.addfile(header, file)
        return header.size
