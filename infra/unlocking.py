"""The client's end of unlocking by invocation, for `strongroom key unlock`.

Owns: what is read from where.
Must not know: the message's form, sealing (model_package), endpoints: the description comes out of one call,
the message goes into another, by any SDK.
Invariant: a key is sealed only for a package whose signature holds and that commits to it, and only to a
container that describes the expected base and image.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from infra.keys import refusals
from infra.report import CommandError, ExitCode, Result

MESSAGE_MODE: Final = 0o600


def seal(
    description: Path, package: Path, owner: str, root: str, key: str, images: Sequence[str], out: Path
) -> Result:
    """Write the unlock message for the package at `package` to `out`. Raises CommandError."""
    with refusals():
        from model_package import key_files, opener, providers, public_keys, schedule, secret, unlock
        from model_package.recipients import Owner
        from model_package.signature import Root, Roots

        secret.harden_process()
        raw = _read(description, unlock.MAX_DOCUMENT_BYTES)
        told = unlock.read_description(raw)
        roots = (Root(public_keys.parse(root, public_keys.Kind.SIGNING).raw),)
        held = Owner(owner)
        trust = opener.Trust(
            held,
            Roots(vendor=roots) if held is Owner.VENDOR else Roots(customer=roots),
            int(time.time()),
            base=told.base if held is Owner.CUSTOMER else None,
        )
        with opener.open_package(package, trust) as opened:
            manifest = opened.manifest
        asked = providers.provider(key, providers.Means(os.environ))
        with secret.wiping(asked.data_key(manifest)) as data_key:
            package_id, committed = bytes.fromhex(manifest.package_id), bytes.fromhex(manifest.commitment)
            schedule.check_commitment(data_key, package_id, committed)
            message = unlock.seal(raw, manifest, data_key, frozenset(images))
        key_files.write_new_text(out, message, MESSAGE_MODE)
    return {"file": str(out), "package_id": manifest.package_id, "image_version": told.image_version}


def show(result: Result) -> None:
    """Print where the message lies and for whom it is."""
    print(f"{result['file']}: for package {result['package_id']}, image {result['image_version']}, one use")


def _read(path: Path, most_bytes: int) -> bytes:
    """Return the file's content, cut one byte after the bound: the parser sees that it is too long."""
    content: bytes | None
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError:
        content = None
    if content is None:
        hint = "save what the `describe` call returned"
        raise CommandError(ExitCode.USAGE, "bad_argument", "`--description` cannot be read", hint)
    return content
