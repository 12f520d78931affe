"""Ed25519 with the `openssl` program: keys, signatures over files, fingerprints.

Owns: the commands. Must not know: what is signed.
Invariant: a private key is read by openssl alone; a signature that does not hold raises.

    openssl pkeyutl -verify -rawin -pubin -inkey vendor.pub -sigfile FILE.sig -in FILE

is all that a check needs. `-rawin` came with openssl 3.0 (pkeyutl(1)); an older one refuses.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

PROGRAM: Final = "openssl"
WAIT_S: Final = 60.0
SIGNATURE_BYTES: Final = 64
# DER of an Ed25519 public key up to the key itself: RFC 8410 4.
PREFIX: Final = bytes.fromhex("302a300506032b6570032100")
KEY_BYTES: Final = 32


class SigningRefused(Exception):
    """A key is not usable, a signature does not hold, or there is no openssl; `hint` is the next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def make_key(private: Path) -> None:
    """Write a fresh private key to a new file of mode 0600; raises SigningRefused, FileExistsError."""
    os.close(os.open(private, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    _run("genpkey", "-algorithm", "ed25519", "-out", str(private))


def public_key(private: Path) -> bytes:
    """Return the public half as PEM; raises SigningRefused."""
    return _run("pkey", "-in", str(private), "-pubout")


def plain(public: Path) -> bytes:
    """Return a public key's PEM in its one form: what stands around it is gone. Raises SigningRefused."""
    return _run("pkey", "-pubin", "-in", str(public), "-pubout")


def fingerprint(public: Path) -> str:
    """Return the SHA-256 of an Ed25519 public key's DER form, in hexadecimal; raises SigningRefused."""
    der = _run("pkey", "-pubin", "-in", str(public), "-outform", "DER")
    if len(der) != len(PREFIX) + KEY_BYTES or not der.startswith(PREFIX):
        raise SigningRefused("the public key is not an Ed25519 key", "take the one that the vendor published")
    return hashlib.sha256(der).hexdigest()


def sign(private: Path, document: bytes) -> bytes:
    """Return the signature over `document`; raises SigningRefused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "document")  # openssl wants to know the length beforehand: no pipe
        file.write_bytes(document)
        signature = _run("pkeyutl", "-sign", "-rawin", "-inkey", str(private), "-in", str(file))
    if len(signature) != SIGNATURE_BYTES:
        raise SigningRefused("the private key is not an Ed25519 key", "make one with `--new-key`")
    return signature


def verify(public: Path, document: bytes, signature: bytes) -> None:
    """Return if `public` signed `document`; raises SigningRefused."""
    fingerprint(public)
    with tempfile.TemporaryDirectory() as folder:
        file, signed = Path(folder, "document"), Path(folder, "signature")
        file.write_bytes(document)
        signed.write_bytes(signature)
        arguments = ("-verify", "-rawin", "-pubin", "-inkey", str(public), "-sigfile", str(signed))
        try:
            _run("pkeyutl", *arguments, "-in", str(file))
        except SigningRefused as error:
            raise SigningRefused(
                "the signature does not hold", "it was made by another key, or the file was tampered with"
            ) from error


def _run(*arguments: str) -> bytes:
    command = [PROGRAM, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=WAIT_S, check=False)  # noqa: S603
    except FileNotFoundError:
        raise SigningRefused("`openssl` is not there", "install openssl 3.0 or newer") from None
    if done.returncode:
        raise SigningRefused(
            f"`openssl {arguments[0]}` failed", "is it openssl 3.0 or newer, and the key a PEM?"
        )
    return done.stdout
