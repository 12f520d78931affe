"""The same sealed files under another manifest: other recipients, a higher epoch, another signer.

Owns: making that copy, FORMAT.md 7.2. Must not know: where keys come from.
Invariant: no sealed byte changes, so the content digest, and with it every adapter's bond, stays; the package
it was made from is not touched, so that there is one which opens at any moment.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from model_package import recipients, schedule, storage
from model_package.beside import Documents
from model_package.manifest import Manifest
from model_package.opener import MANIFEST_NAME, Package
from model_package.sealer import Wrap, publish
from model_package.sealing import SealError
from model_package.secret import wipe


def rewrap(
    source: Path,
    package: Package,
    destination: Path,
    data_key: bytearray,
    wrap: Wrap,
    signer: bytearray,
    epoch: int | None = None,
    documents: Documents | None = None,
) -> Manifest:
    """Write `package`, opened from the directory `source`, to the new directory `destination` for others.

    Sealed files are linked where both lie on one file system, else copied. `epoch` None keeps it; `documents`
    are laid beside it. Takes over `data_key` and wipes it; `signer` stays the caller's. Raises PackageError,
    SealError, OSError.
    """
    old = package.manifest
    try:
        package_id = bytes.fromhex(old.package_id)
        schedule.check_commitment(data_key, package_id, bytes.fromhex(old.commitment))
        wrapped = recipients.arranged(wrap(old.key_context, data_key))
    finally:
        wipe(data_key)
    if epoch is not None and epoch < old.epoch:
        raise SealError("an epoch is never lowered")
    made = msgspec.structs.replace(old, recipients=wrapped, epoch=old.epoch if epoch is None else epoch)
    directory = _new_directory(destination)
    try:
        for entry in old.files:
            _take(source / entry.stored_name, destination / entry.stored_name)
        os.fsync(directory)
        publish(directory, made, signer, documents)
    finally:
        os.close(directory)
    return made


def _new_directory(destination: Path) -> int:
    storage.make_directory(destination)
    if (destination / MANIFEST_NAME).exists():
        raise SealError("the destination holds a package already")
    if any(destination.iterdir()):
        raise SealError("the destination is not empty")
    return storage.open_directory(destination)


def _take(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination, follow_symlinks=False)
        fd = os.open(destination, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(fd, storage.PUBLIC)
            os.fsync(fd)
        finally:
            os.close(fd)
