"""Checks 6 to 10, 12 to 15, 18, 26 and 30: which files there are, whose, and what they must not hold.

Owns: these checks. Must not know: packages (packages.py), containers.
Invariant: see table.py. What a later layer deletes is still looked at where the check says: any layer.
"""

from __future__ import annotations

import posixpath
import re
from datetime import datetime
from typing import Final

from infra.image.checks.configuration import SECRET
from infra.image.checks.table import Findings, Table
from infra.image.subject import Entry, Image

TABLE: Final = Table[Image]()
SHELLS: Final = {"sh", "bash", "dash", "ash", "zsh", "busybox", "toybox"}
TOOLS: Final = (
    {"apt", "apt-get", "dpkg", "apk", "rpm", "yum", "dnf", "pip", "pip3", "conda", "uv", "easy_install"}
    | {"gcc", "g++", "cc", "c++", "clang", "as", "ld", "make", "protoc", "nvcc", "ptxas", "perl"}
    | {"curl", "wget", "nc", "ncat", "socat", "telnet", "ftp", "ssh", "sshd", "scp", "sudo", "su", "mount"}
)
LEFTOVERS: Final = re.compile(
    r"(^|/)(\.git|\.pytest_cache|\.cache|tests?/__pycache__|\.mypy_cache)(/|$)|^var/(cache|lib/apt|lib/dpkg)/."
    r"|^root/.|^opt/strongroom/lib/python3\.11/site-packages/(tests|scripts)/"
)
CERTIFICATES: Final = re.compile(r"(^|/)(cacert\.pem|ca-certificates\.crt|ca-bundle\.crt|cert\.pem)$")
PICKLES: Final = re.compile(r"\.(pkl|pickle|joblib|pt|pth\.tar|ckpt|dill)$")
ACCOUNTS: Final = {"root", "strongroom"}
SCANNED_BYTES: Final = 2_000_000  # a larger file is a library or a table


@TABLE.check(6, "no setuid or setgid file, in any layer")
def setuid(image: Image) -> Findings:
    return [e.path for e in image.entries if e.mode & 0o6000 and not e.member.isdir()]


@TABLE.check(7, "no file capabilities, in any layer")
def capabilities(image: Image) -> Findings:
    return [e.path for e in image.entries if any("capability" in key for key in e.member.pax_headers)]


@TABLE.check(8, "nothing is writable by all but directories with the sticky bit")
def writable(image: Image) -> Findings:
    def wrong(entry: Entry) -> bool:
        open_to_all = bool(entry.mode & 0o002) and not entry.member.issym()
        return open_to_all and not (entry.member.isdir() and entry.mode & 0o1000)

    return [entry.path for entry in image.final.values() if wrong(entry)]


@TABLE.check(9, "every file belongs to an account that exists")
def owned(image: Image) -> Findings:
    users = {line.split(":")[2] for line in image.text("etc/passwd").splitlines()}
    groups = {line.split(":")[2] for line in image.text("etc/group").splitlines()}
    return [
        entry.path
        for entry in image.final.values()
        if str(entry.member.uid) not in users or str(entry.member.gid) not in groups
    ]


@TABLE.check(10, "no private key or token, in any layer")
def keys(image: Image) -> Findings:
    return [e.path for e in image.entries if _is_text(e) and SECRET.search(_decoded(image, e))]


@TABLE.check(12, "no history, tests, caches or package lists")
def leftovers(image: Image) -> Findings:
    return [path for path in image.final if LEFTOVERS.search(path)]


@TABLE.check(13, "no package manager, compiler, or program that fetches or changes user")
def tools(image: Image) -> Findings:
    return [entry.path for entry in _programs(image) if _base(entry) in TOOLS]


@TABLE.check(14, "no shell")
def shells(image: Image) -> Findings:
    return [entry.path for entry in _programs(image) if _base(entry) in SHELLS]


@TABLE.check(15, "no password, and no account beyond root and the service's")
def accounts(image: Image) -> Findings:
    found = []
    for line in image.text("etc/passwd").splitlines():
        name, password = line.split(":")[:2]
        found += [f"the account `{name}`"] * (name not in ACCOUNTS)
        found += [f"a password of `{name}`"] * (password not in ("x", "*", "!"))
    for line in image.text("etc/shadow").splitlines():
        found += [f"a password of `{line.split(':')[0]}`"] * (
            line.split(":")[1] not in ("*", "!", "!*", "!!")
        )
    return found


@TABLE.check(18, "every entry has the image's own time")
def times(image: Image) -> Findings:
    created_s = datetime.fromisoformat(image.document["created"].replace("Z", "+00:00")).timestamp()
    return [entry.path for entry in image.entries if entry.member.mtime != created_s]


@TABLE.check(26, "no certificate bundle: nothing here calls out")
def certificates(image: Image) -> Findings:
    return [path for path in image.final if CERTIFICATES.search(path)]


@TABLE.check(30, "no pickle: a pickle is code")
def pickles(image: Image) -> Findings:
    return [path for path in image.final if PICKLES.search(path)]


def _programs(image: Image) -> list[Entry]:
    """What can be started, links to it included."""
    kinds = (entry for entry in image.final.values() if entry.is_file or entry.member.issym())
    return [entry for entry in kinds if entry.mode & 0o111 and "/site-packages/" not in entry.path]


def _base(entry: Entry) -> str:
    return re.sub(r"[-\d.]+$", "", posixpath.basename(entry.path)) or entry.path


def _is_text(entry: Entry) -> bool:
    return (
        entry.is_file and 0 < entry.member.size <= SCANNED_BYTES and not entry.path.endswith((".so", ".pyc"))
    )


def _decoded(image: Image, entry: Entry) -> str:
    return image.content(entry).decode("latin-1")
