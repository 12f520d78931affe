"""The demo's sealed package: the model made ready once per machine, sealed and verified anew for each run.

Owns: the copy that is made ready, the keys of one run and where they lie.
Must not know: how a decoder is made ready, what serves the package.
Invariant: the checkpoint is never written to; keys and package of a run are gone when it ends.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model_package import key_files, opener, sealer, secret, signing_keys
from model_package.manifest import Model
from model_package.recipients import Owner
from model_package.signature import Root, Roots
from scripts.progress import Told

ROOT: Final = Path(__file__).parent.parent
# What decides how a decoder is stored.
MAKERS: Final = ("model/ready_files.py", "model/ready_make.py", "kernels/block_weight.py")
SCHEME: Final = "int8-block"
GIGABYTE: Final = 1e9


@dataclass(frozen=True, slots=True)
class Sealed:
    """A package that is ready to serve, and what its endpoint has to be told."""

    path: Path
    key: Path
    environment: dict[str, str]
    sealed_s: float
    verified_s: float
    sealed_bytes: int


def makers_digest() -> str:
    """Return eight hexadecimal digits that change with what decides how a decoder is stored."""
    return hashlib.sha256(b"".join((ROOT / "container" / name).read_bytes() for name in MAKERS)).hexdigest()[
        :8
    ]


def ensure_ready(checkpoint: Path, told: Told) -> Path:
    """Return a directory of the model in `checkpoint` with its ready decoder, made the first time."""
    copy = checkpoint.with_name(f"{checkpoint.name}-ready-{makers_digest()}")
    if copy.exists():
        return copy
    unfinished = Path(tempfile.mkdtemp(prefix=f".{copy.name}.", dir=copy.parent))
    try:
        told("making its decoder ready (once)", 0.9)
        make_ready(checkpoint, unfinished)
        unfinished.rename(copy)
    except OSError:
        if not copy.exists():  # else another run was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return copy


def make_ready(checkpoint: Path, folder: Path) -> None:
    """Fill the empty `folder` with the files of `checkpoint` and their ready decoder.

    Raises subprocess.CalledProcessError, with what was said to stderr, when it cannot be made.
    """
    for path in checkpoint.iterdir():
        if path.is_file():
            _link(path, folder / path.name)
    words = ("--model", str(folder), "--tensor-parallel", "1", "--quantize", SCHEME)
    command = [sys.executable, "-m", "container.model.parts", *words]
    subprocess.run(  # noqa: S603 - ours
        command, cwd=ROOT, check=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # another file system
        shutil.copyfile(path, copy)


@contextmanager
def sealed(model: Path, name: str, told: Told) -> Iterator[Sealed]:
    """Seal the directory `model` under new keys and verify it as a reader would; it goes afterwards."""
    secret.harden_process()
    folder = Path(tempfile.mkdtemp(prefix=".sealed-", dir=model.parent))
    try:
        yield _seal(model, folder, name, told)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _seal(model: Path, folder: Path, name: str, told: Told) -> Sealed:
    key_path, package = folder / "key", folder / "package"
    now_s = int(time.time())
    made = sealer.Sealing(
        Owner.VENDOR, Model(name, "1"), created_s=now_s, threads=len(os.sched_getaffinity(0))
    )
    began_s = time.monotonic()
    with (
        secret.wiping(bytearray(os.urandom(secret.KEY_BYTES))) as data_key,
        secret.wiping(signing_keys.make_private()) as signer,
    ):
        root = Root(signing_keys.public_of(signer))
        key_files.write_new(key_path, data_key)
        files = sealer.files_of(model)
        manifest = sealer.seal(
            files,
            package,
            made,
            data_key,
            sealer.to_public_keys(()),
            signer,
            lambda done, total: told("sealing", done / max(1, total)),
        )
    sealed_s = time.monotonic() - began_s
    total = sum(entry.size for entry in manifest.files)
    with opener.open_package(package, opener.Trust(Owner.VENDOR, Roots(vendor=(root,)), now_s)) as reader:
        reader.prove_whole(lambda done: told("verifying", done / total))
    return Sealed(
        path=package,
        key=key_path,
        environment={
            "STRONGROOM_KEY": f"file:{key_path}",
            "STRONGROOM_VENDOR_ROOTS": f"ed25519:{root.public_key.hex()}",
        },
        sealed_s=sealed_s,
        verified_s=time.monotonic() - began_s - sealed_s,
        sealed_bytes=total,
    )
