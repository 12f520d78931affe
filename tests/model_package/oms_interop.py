"""Our model-signing bundles and that project's own tool, both ways: `scripts/check-signing` runs this.

Owns: the comparison, and with `--write` the samples in `oms/`. Must not know: how a bundle is made.
Invariant: what either makes the other verifies; what was tampered with, neither.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization

from model_package import oms

SAMPLES: Final = Path(__file__).parent / "oms"
PRIVATE: Final = bytes(range(1, 33))  # a scalar that guards nothing
CONTENT: Final = {"manifest.json": b"{}", "manifest.sig": b"signature", "weights.sealed": bytes(range(256))}
TOOL: Final = "model-signing 1.1.1"


class Tool:
    """The project's command line, in the environment of the interpreter that is given."""

    def __init__(self, python: str, folder: Path) -> None:
        self._command = [python, "-m", "model_signing"]
        self._private, self.public = folder / "private.pem", folder / "public.pem"
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key = oms._private_key(bytearray(PRIVATE))
        self._private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        self.public.write_bytes(oms.public_pem(bytearray(PRIVATE)))

    def verifies(self, model: Path) -> bool:
        given = ["--signature", model / oms.NAME, "--public_key", self.public, model]
        return self._run("verify", "key", *given) == 0

    def sign(self, model: Path) -> None:
        given = ["--signature", model / oms.NAME, "--private_key", self._private, model]
        if self._run("sign", "key", *given):
            raise SystemExit("error: the tool did not sign")

    def _run(self, *arguments: object) -> int:
        done = subprocess.run([*self._command, *map(str, arguments)], check=False, stdout=subprocess.DEVNULL)
        return done.returncode


def lay_out(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


def compare(tool: Tool, folder: Path) -> dict[str, bool]:
    """Return each claim and whether it held; the folders `ours` and `theirs` are made in `folder`."""
    ours, theirs = lay_out(folder / "ours"), lay_out(folder / "theirs")
    pem = oms.public_pem(bytearray(PRIVATE))
    digests = {name: oms.hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    (ours / oms.NAME).write_bytes(oms.sign(bytearray(PRIVATE), ours.name, digests))
    tool.sign(theirs)
    held = {"the tool verifies ours": tool.verifies(ours)}
    held["we verify the tool's"] = _holds(lambda: oms.check(theirs, (theirs / oms.NAME).read_bytes(), pem))
    for model in (ours, theirs):
        damaged = shutil.copytree(model, folder / "damaged" / model.name)
        (damaged / "weights.sealed").write_bytes(CONTENT["weights.sealed"][::-1])
        held[f"the tool refuses {model.name} with a changed file"] = not tool.verifies(damaged)
        signed = (damaged / oms.NAME).read_bytes()
        held[f"we refuse {model.name} with a changed file"] = not _holds(
            lambda at=damaged, raw=signed: oms.check(at, raw, pem)  # type: ignore[misc]
        )
    return held


def _holds(check: Callable[[], None]) -> bool:
    try:
        check()
    except oms.OmsError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="check-signing", allow_abbrev=False)
    parser.add_argument("--python", required=True, help="interpreter that has model-signing and pyOpenSSL")
    parser.add_argument("--write", action="store_true", help="put the samples into the tree")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="strongroom-signing-") as name:
        folder = Path(name)
        held = compare(Tool(chosen.python, folder), folder)
        if chosen.write and all(held.values()):
            shutil.rmtree(SAMPLES, ignore_errors=True)
            for sample in ("ours", "theirs"):
                shutil.copytree(folder / sample, SAMPLES / sample)
    print(json.dumps({"ok": all(held.values()), "tool": TOOL, "held": held}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
