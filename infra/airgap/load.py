"""Loading a bundle: unpacked with distrust, verified by this checkout's own script, then loaded by its own.

Owns: the unpacking, the order. Must not know: what verifying and loading look at (bin/ does).
Invariant: nothing is written outside the folder that is made for it, and nothing of the bundle runs before
verify.sh, the copy that came with this checkout, has found all of it sound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import Final

VERIFY: Final = Path(__file__).parent / "bin" / "verify.sh"
REFUSED: Final = 5


class BundleRefused(Exception):
    """The archive is no bundle; `hint` is the next move."""

    hint = "get the bundle again, from the vendor"


def main(arguments: list[str]) -> int:
    """Unpack, verify and load; the last line of stdout is one JSON document. Returns verify.sh's statuses."""
    parser = argparse.ArgumentParser(prog="scripts/airgap-load", allow_abbrev=False)
    parser.add_argument("bundle", type=Path, help="the archive, or the folder that it was unpacked to")
    parser.add_argument("--fingerprint", required=True, help="of the vendor's key, from another source")
    parser.add_argument("--to", type=Path, default=Path(), help="where to unpack")
    parser.add_argument("--verify-only", action="store_true", help="load nothing into docker")
    chosen = parser.parse_args(arguments)
    try:
        folder = chosen.bundle if chosen.bundle.is_dir() else unpack(chosen.bundle, chosen.to)
    except BundleRefused as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return _told(REFUSED, None)
    except OSError as error:
        print(f"error: {error.strerror}: `{error.filename}`\nhint: choose another path", file=sys.stderr)
        return _told(3, None)
    status = _shell(VERIFY, chosen.fingerprint, str(folder))
    if status == 0 and not chosen.verify_only:
        status = _shell(folder / "bin" / "load.sh", chosen.fingerprint)
    return _told(status, folder)


def unpack(bundle: Path, to: Path) -> Path:
    """Unpack an archive into one new folder below `to` and return that; raises BundleRefused, OSError."""
    try:
        with tarfile.open(bundle, "r:") as archive:
            members = archive.getmembers()
            top = _check(members)
            (to / top).mkdir(parents=True)
            for member in members:
                target = to / member.name
                if member.isdir():
                    target.mkdir(exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None, "only plain files are left"
                with target.open("xb") as written:
                    while piece := source.read(1024 * 1024):
                        written.write(piece)
                target.chmod(0o644)
    except tarfile.TarError as error:
        raise BundleRefused("the archive cannot be read") from error
    return to / top


def _check(members: list[tarfile.TarInfo]) -> str:
    """Return the one folder that all members are below; raises BundleRefused for any that is not plain."""
    tops = set()
    for member in members:
        parts = PurePosixPath(member.name).parts
        if not (member.isreg() or member.isdir()):
            raise BundleRefused(f"the archive holds {member.name!r}, which is no plain file")
        if not parts or member.name.startswith("/") or ".." in parts or "\0" in member.name:
            raise BundleRefused(f"the archive holds the name {member.name!r}")
        tops.add(parts[0])
    if len(tops) != 1 or len({member.name for member in members}) != len(members):
        raise BundleRefused("the archive is not one folder, each file once")
    return str(tops.pop())


def _shell(script: Path, *arguments: str) -> int:
    return subprocess.run(["/bin/sh", str(script), *arguments], check=False).returncode  # noqa: S603


def _told(status: int, folder: Path | None) -> int:
    print(
        json.dumps({"ok": status == 0, "folder": str(folder or ""), "status": status}, separators=(",", ":"))
    )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
