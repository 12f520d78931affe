"""Checks 1 to 5, 11, 16, 17, 25 and 27: what the image's configuration says.

Owns: these checks. Must not know: files, containers.
Invariant: see table.py.
"""

from __future__ import annotations

import re
from typing import Final

from infra.image.checks.table import Findings, Table
from infra.image.subject import Image

TABLE: Final = Table[Image]()
PORT: Final = "8080/tcp"
BUDGET_BYTES: Final = {"cpu": 1_200_000_000, "cuda": 9_000_000_000}
ISOLATED: Final = ["-I", "-B", "-X", "utf8"]
LABELS: Final = ("version", "revision", "created", "licenses", "base.digest")
SECRET_NAME: Final = re.compile(r"(?i)(passw|secret|token|api_?key|private_?key|credential)")
# A library that reads keys has the marker as a constant of its own: what a quote ends there is no key.
SECRET: Final = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?![\"'])|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z0-9]{34}\b|\bsk-[A-Za-z0-9]{40,}\b|\bxox[abp]-[0-9A-Za-z-]{20,}|\bglpat-[A-Za-z0-9_-]{20}\b"
)


@TABLE.check(1, "a numeric user that is not root")
def user(image: Image) -> Findings:
    named = str(image.config.get("User", ""))
    return [] if re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", named) else [f"the user is `{named}`"]


@TABLE.check(2, "the base is named by digest")
def base(image: Image) -> Findings:
    digest = image.labels().get("org.opencontainers.image.base.digest", "")
    return [] if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) else [f"the base's digest is `{digest}`"]


@TABLE.check(3, "nothing is added from a URL")
def added(image: Image) -> Findings:
    return [
        line for line in _history(image) if re.search(r"\bADD\s+\S*(https?|ftp)://|\bADD .*\burl\b", line)
    ]


@TABLE.check(4, "a health check, or its absence said")
def health(image: Image) -> Findings:
    said = (image.config.get("Healthcheck") or {}).get("Test")
    return [] if said else ["nothing is said of a health check"]


@TABLE.check(5, "the entry point is a list that takes the platform's argument")
def entry_point(image: Image) -> Findings:
    entry = image.config.get("Entrypoint") or []
    if not entry:
        return ["there is no entry point"]
    shell = entry[0].rsplit("/", 1)[-1] in ("sh", "bash", "dash", "ash")
    fixed = image.config.get("Cmd")
    return ["the entry point is a shell's"] * shell + [f"a command is fixed: {fixed}"] * bool(fixed)


@TABLE.check(11, "no secret in environment, labels or history")
def secrets(image: Image) -> Findings:
    named = [name for name in (*image.env(), *image.labels()) if SECRET_NAME.search(name)]
    values = [*image.env().values(), *image.labels().values(), *_history(image)]
    return [f"`{name}` is named like a secret" for name in named] + [
        "a value looks like a secret" for value in values if SECRET.search(value)
    ]


@TABLE.check(16, "only the service's port is exposed")
def exposed(image: Image) -> Findings:
    ports = sorted(image.config.get("ExposedPorts") or {})
    return [] if ports == [PORT] else [f"exposed: {', '.join(ports) or 'nothing'}"]


@TABLE.check(17, "labels say version, revision, time, licence and base")
def labels(image: Image) -> Findings:
    said = image.labels()
    names = [f"org.opencontainers.image.{name}" for name in LABELS]
    found = [f"`{name}` is missing" for name in names if not said.get(name)]
    if said.get("org.opencontainers.image.created") != image.document["created"]:
        found.append("the label's time is not the image's")
    return found


@TABLE.check(25, "within the size budget")
def size(image: Image) -> Findings:
    total = sum(entry.member.size for entry in image.entries if entry.is_file)
    limit = BUDGET_BYTES[image.labels().get("strongroom.variant", "cpu")]
    return [] if total <= limit else [f"{total / 1e6:.0f} MB of {limit / 1e6:.0f} MB"]


@TABLE.check(27, "Python runs isolated, writes no byte code and hashes at random")
def isolation(image: Image) -> Findings:
    entry, env = image.config.get("Entrypoint") or [], image.env()
    found = [] if entry[1:5] == ISOLATED else [f"the interpreter gets {entry[1:5]}"]
    found += [] if env.get("PYTHONDONTWRITEBYTECODE") == "1" else ["byte code would be written"]
    return found + [
        f"`{name}` is set" for name in ("PYTHONPATH", "PYTHONHASHSEED", "PYTHONHOME") if name in env
    ]


def _history(image: Image) -> list[str]:
    return [str(entry.get("created_by", "")) for entry in image.document.get("history", ())]
