"""Making the evidence: two runs of the image, one report, signed where a key is given.

Owns: which runs there are, what is written where. Must not know: what is observed, how it is judged.
Invariant: what is written names the image by its id, so that it can be told for which it holds.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from infra.image import build
from infra.image.docker import docker, inspect
from infra.image.serving import Way
from infra.privacy import plan, report
from infra.privacy.detectors import Observed
from infra.privacy.subject import in_a_container
from infra.privacy.watching import watch
from infra.release import openssl

CALLS: Final = 1000
CANARIES: Final = 500
IDLE_S: Final = 60.0
SHORT_IDLE_S: Final = 5.0
JSON_NAME, PAGE_NAME = "evidence.json", "evidence.md"
SIGNATURE_NAME, KEY_NAME = "evidence.sig", "evidence.pub"


@dataclass(frozen=True, slots=True)
class Told:
    """What is to be proven of which image with which model."""

    image: str
    model: Path
    environment: Mapping[str, str]
    mounts: Sequence[str]
    out: Path
    calls: int = CALLS
    canaries: int = CANARIES
    idle_s: float = IDLE_S
    ways: Sequence[Way] = tuple(Way)
    key: Path | None = None  # signs the evidence
    command: str = "scripts/prove-privacy"


def prove(told: Told, say: Callable[[str], None]) -> dict[str, Any]:
    """Run, judge, write and return the evidence; raises DockerFailed, NeverHealthy, SigningRefused."""
    runs = {f"Over {way.value}": observe(told, way, say) for way in told.ways}
    evidence = report.document(facts(told), runs, commands(told))
    text = json.dumps(evidence, indent=1).encode() + b"\n"
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / JSON_NAME).write_bytes(text)
    (told.out / PAGE_NAME).write_text(report.markdown(evidence))
    if told.key is not None:
        (told.out / SIGNATURE_NAME).write_bytes(openssl.sign(told.key, text))
        (told.out / KEY_NAME).write_bytes(openssl.public_key(told.key))
    return evidence


def observe(told: Told, way: Way, say: Callable[[str], None]) -> Observed:
    """Return what one run showed; the whole wait for memory is spent once."""
    say(f"the image over {way.value}")
    asked = plan.make(told.calls, told.canaries)
    idle_s = told.idle_s if way is told.ways[0] else min(told.idle_s, SHORT_IDLE_S)
    contained = in_a_container(told.image, told.model, way, environment=told.environment, mounts=told.mounts)
    return watch(contained, asked, idle_s, say)


def facts(told: Told) -> dict[str, Any]:
    """Return what was examined, where and when."""
    image = inspect(told.image)
    labels = image["Config"]["Labels"] or {}
    names = {"version": "version", "revision": "revision", "base": "base.digest"}
    subject = {name: labels.get(f"org.opencontainers.image.{key}", "") for name, key in names.items()}
    server = docker("version", "--format", "{{.Server.Version}}").strip()
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "subject": {"image": told.image, "image id": image["Id"], **subject, **_model(told.model)},
        "host": {
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
            "docker": server,
            "python of the prover": platform.python_version(),
            "prover": build.git("rev-parse", "HEAD"),
        },
    }


def commands(told: Told) -> list[str]:
    """Return how to make the evidence again, and how to check a signature over it."""
    verify = f"openssl pkeyutl -verify -rawin -pubin -inkey {KEY_NAME} -sigfile {SIGNATURE_NAME}"
    check = [f"{verify} -in {JSON_NAME}"] if told.key is not None else []
    return ["git checkout REVISION    # as named above", "scripts/build-image && scripts/check-image --again",
            told.command, *check]  # fmt: skip


def _model(folder: Path) -> dict[str, str]:
    signed = folder / "manifest.json"
    if not signed.exists():
        return {"model": "not sealed"}
    command = ["sha256sum", str(signed)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return {"model": f"sealed, manifest {said.split()[0]}"}
