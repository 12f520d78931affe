"""Making, naming and comparing keys for `strongroom key`.

Owns: which kind of key goes with which primitive, results without secrets.
Must not know: key formats and files (model_package does).
Invariant: a private key is made or read in a hardened process, wiped before the verb returns, never shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from infra.report import CommandError, ExitCode, Result

INSTALLATION: Final = "installation"
HYBRID: Final = "hybrid"
SIGNING: Final = "signing"
OMS: Final = "oms"
USAGE_PREFIXES: Final = ("source-", "public-key-")
MACHINE_PREFIXES: Final = ("key-", "service-", "clock-state-")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn what the package room raises into CommandError, and its absence too."""
    failure: CommandError | None = None
    try:
        from model_package import beside, hpke, oms, outcome, refusal, secret, signing_keys
    except ModuleNotFoundError:
        failure = CommandError(
            ExitCode.ENVIRONMENT_MISSING,
            "no_cryptography",
            "what handles packages is not installed",
            "install strongroom[deploy]",
        )
    if failure is not None:
        raise failure
    try:
        yield
    except refusal.KeyRefused as error:
        failure = CommandError(_code(error.refusal), _word(error.refusal), error.message, error.hint)
    except outcome.PackageError as error:
        word = _word(error.outcome)
        failure = CommandError(ExitCode.VERIFICATION_FAILED, word, error.message, error.hint)
    except (hpke.HpkeError, signing_keys.SigningKeyError, oms.OmsKeyRefused) as error:
        failure = CommandError(ExitCode.USAGE, "key_refused", error.message, error.hint)
    except (beside.DocumentsRefused, oms.OmsError) as error:
        failure = CommandError(ExitCode.VERIFICATION_FAILED, "documents_refused", error.message, error.hint)
    except secret.HardeningError as error:
        failure = CommandError(ExitCode.ENVIRONMENT_MISSING, "not_hardened", error.message, error.hint)
    if failure is not None:  # outside the handlers: no traceback holds a key
        raise failure


def make(kind: str, out: Path) -> Result:
    """Make a key of `kind`, write its private half to `out`, return its public half. Raises CommandError."""
    with refusals():
        from model_package import hpke, key_files, oms, secret, signing_keys

        secret.harden_process()
        if kind in (INSTALLATION, HYBRID):
            fresh = hpke.make_private()
        elif kind == OMS:
            fresh = oms.make_private()
        elif kind == SIGNING:
            fresh = signing_keys.make_private()
        else:
            fresh = secret.take_over(os.urandom(secret.KEY_BYTES))
        with secret.wiping(fresh) as private:
            key_files.write_new(out, private)
            described = _described(kind, private)
    return {"kind": kind, "file": str(out), **described}


def public(kind: str, key: Path) -> Result:
    """Return the public half of the private key in the file `key`. Raises CommandError."""
    with refusals():
        from model_package import key_files, secret

        secret.harden_process()
        with secret.wiping(key_files.read_file(key)) as private:
            return {"kind": kind, **_described(kind, private)}


def split(key: Path, image_share: Path, artifact_share: Path) -> Result:
    """Write two shares whose XOR is the key in the file `key`: both or neither. Raises CommandError."""
    with refusals():
        from model_package import key_files, secret, sources

        secret.harden_process()
        with secret.wiping(key_files.read_file(key)) as whole:
            first, second = sources.split(whole)
            with secret.wiping(first), secret.wiping(second):
                key_files.write_new(image_share, first)
                try:
                    key_files.write_new(artifact_share, second)
                except BaseException:
                    image_share.unlink()
                    raise
    return {"kind": "shares", "image": str(image_share), "artifact": str(artifact_share)}


def describe(text: str) -> Result:
    """Return what the public key in `text` is for, and its id. Raises CommandError."""
    with refusals():
        from model_package import public_keys

        found = public_keys.parse(text)
        kind = {public_keys.Kind.SIGNING: SIGNING, public_keys.Kind.HYBRID: HYBRID}.get(
            found.kind, INSTALLATION
        )
        return {"kind": kind, "public": found.text, "id": found.id}


def show(result: Result) -> None:
    """Print the public key alone on stdout, to be sent as it is; what else is to be said on stderr."""
    if "file" in result:
        said = f"private key: {result['file']} (mode 0600; keep a copy in a safe place)"
        print(said, file=sys.stderr)
    if "image" in result:
        said = f"one share for the image in {result['image']}, one for the artifact in {result['artifact']}"
        print(f"{said}: obfuscation, both together are the key", file=sys.stderr)
    if "public" in result:
        print(f"{result['kind']} key, id {result['id']}", file=sys.stderr)
        print(result["public"])


def _described(kind: str, private: bytearray) -> Result:
    from model_package import hpke, oms, public_keys, signing_keys

    if kind == OMS:  # PEM, and as id the digest that its bundles name it by
        pem = oms.public_pem(private)
        return {"public": pem.decode(), "id": hashlib.sha256(pem).hexdigest()}
    if kind == INSTALLATION:
        found = public_keys.PublicKey(public_keys.Kind.RECIPIENT, hpke.public_of(private))
    elif kind == HYBRID:
        found = public_keys.PublicKey(public_keys.Kind.HYBRID, hpke.hybrid_public_of(private))
    elif kind == SIGNING:
        found = public_keys.PublicKey(public_keys.Kind.SIGNING, signing_keys.public_of(private))
    else:
        return {}
    return {"public": found.text, "id": found.id}


def _word(name: str) -> str:
    return name.replace("-", "_")


def _code(name: str) -> ExitCode:
    if name.startswith(USAGE_PREFIXES) or name == "key-file-exists":
        return ExitCode.USAGE
    return ExitCode.ENVIRONMENT_MISSING if name.startswith(MACHINE_PREFIXES) else ExitCode.VERIFICATION_FAILED
