"""Building the image: base, wheels, context, docker build, and the rewriting that makes it the same again.

Owns: the order of the steps, what a build is told, the report.
Must not know: what is inside the image (root.py, contents.py), how an archive is rewritten (archive.py).
Invariant: from the wheelhouse on, no step needs a network, and the build itself has none. Two builds of one
commit with one base give one image id.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from infra.image import archive, wheelhouse
from infra.image.docker import DockerFailed, docker, inspect, options, run
from infra.image.size import parts
from infra.image.subject import Image

ROOT: Final = Path(__file__).resolve().parents[2]
SUITE: Final = "bookworm"
BASE_PACKAGES: Final = ("python3", "python3-pip", "g++")
BASE_NAME: Final = "strongroom-base"
NAME: Final = "strongroom"
# What the project's own layer is made of; tests and scripts stay outside.
SOURCES: Final = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "container",
    "sagemaker_entry",
    "model_package",
    "infra",
)


@dataclass(frozen=True, slots=True)
class Told:
    """What a build is told."""

    variant: str
    base: str
    tag: str
    cache: Path
    clean: bool  # build every step again


def main(arguments: list[str]) -> int:
    """Build the image; the last line of stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="scripts/build-image", allow_abbrev=False)
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", default="", help="an image by digest; without one, a base is made here")
    parser.add_argument("--tag", default="", help=f"name of the result; `{NAME}:VERSION-VARIANT`")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "image")
    parser.add_argument("--clean", action="store_true", help="use no step of an earlier build")
    chosen = parser.parse_args(arguments)
    tag = chosen.tag or f"{NAME}:{version()}-{chosen.variant}"
    try:
        report = build(Told(chosen.variant, chosen.base, tag, chosen.cache, chosen.clean))
    except (DockerFailed, wheelhouse.WheelRefused, BaseRefused) as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 3
    print(json.dumps(report, separators=(",", ":")))
    return 0


class BaseRefused(Exception):
    """There is no base to build on; `hint` is the operator's next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def build(told: Told) -> dict[str, Any]:
    """Build, rewrite and load the image; return what it is.

    Raises DockerFailed, WheelRefused, BaseRefused.
    """
    began = time.monotonic()
    told.cache.mkdir(parents=True, exist_ok=True)
    epoch_s = source_epoch_s()
    base, base_digest = base_image(told, epoch_s)
    say(f"base: {base_digest}")
    wheels = told.cache / f"wheelhouse-{told.variant}"
    locked = wheelhouse.read_lock((ROOT / "container" / f"requirements-{told.variant}.lock").read_text())
    checkout = wheelhouse.read_lock((ROOT / "tests" / f"requirements-{told.variant}.lock").read_text())
    tools = wheelhouse.build_tools(checkout)
    wheelhouse.fill(wheels, [*locked, *tools])
    say(f"wheels: {len(locked)} locked, {len(tools)} to build with, all verified")
    with tempfile.TemporaryDirectory(dir=told.cache) as folder:
        context = Path(folder, "context")
        lay_out(context, wheels, locked, tools)
        raw = f"{told.tag}-raw"
        docker_build(told, raw, base, base_digest, epoch_s, context)
        say("built; rewriting it without the time of its making")
        identity, held = rewrite(raw, told.tag, Path(folder), epoch_s)
    assert inspect(told.tag)["Id"] == identity.image_id, "docker computes the same id"
    return {
        "ok": True,
        "tag": told.tag,
        "image_id": identity.image_id,
        "manifest_digest": identity.manifest_digest,
        "base_digest": base_digest,
        "layers_mb": [round(layer.content_bytes / 1e6, 1) for layer in identity.layers],
        "unpacked_mb": round(identity.content_bytes / 1e6, 1),
        "parts_mb": {name: round(size_bytes / 1e6, 1) for name, size_bytes in held.items()},
        "total_s": round(time.monotonic() - began, 1),
    }


def base_image(told: Told, epoch_s: int) -> tuple[str, str]:
    """Return name and digest of the base: the given one, or one bootstrapped from Debian's archive."""
    if told.base:
        if "@sha256:" not in told.base:
            raise BaseRefused(f"`{told.base}` can change its contents", "name the base as NAME@sha256:DIGEST")
        return told.base, told.base.partition("@")[2]
    root = told.cache / f"base-{SUITE}.tar"
    if not root.exists():
        bootstrap(root, epoch_s)
    packed = told.cache / f"base-{SUITE}.docker.tar"
    digest = wheelhouse.digest(root)
    name = f"{BASE_NAME}:{digest[:16]}"
    if run("inspect", "--type", "image", name).returncode != 0:
        archive.from_root(root, packed, name, architecture(), epoch_s)
        docker("load", stdin=packed)
        packed.unlink()
    return name, f"sha256:{digest}"


def bootstrap(root: Path, epoch_s: int) -> None:
    """Make a minimal Debian with an interpreter and a compiler; raises BaseRefused. Needs root."""
    program = shutil.which("mmdebstrap")
    if program is None:
        raise BaseRefused("no base was named and `mmdebstrap` is not there", "apt-get install mmdebstrap")
    partial = root.with_suffix(".partial.tar")
    command = [program, "--quiet", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", SUITE]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch_s)}
    say(f"bootstrapping {SUITE} (about a minute)")
    done = subprocess.run(  # noqa: S603  a fixed program
        [*command, str(partial)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BaseRefused(f"mmdebstrap failed: {done.stderr.strip()[-300:]}", "is Debian's archive in reach?")
    partial.rename(root)


def lay_out(
    context: Path, wheels: Path, locked: list[wheelhouse.Locked], tools: list[wheelhouse.Locked]
) -> None:
    """Fill the folder that docker is given: Dockerfile, wheels, locks, tracked sources."""
    context.mkdir()
    shutil.copy2(ROOT / "container" / "Dockerfile", context / "Dockerfile")
    shutil.copytree(wheels, context / "wheelhouse", copy_function=os.link)
    for name, lines in (("requirements.lock", locked), ("tools.lock", tools)):
        (context / name).write_text("".join(line.text + "\n" for line in lines))
    listed = subprocess.run(  # noqa: S603  a fixed program
        ["git", "-C", str(ROOT), "ls-files", "-z", "--", *SOURCES],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        target = context / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        target.chmod(0o644)


def docker_build(told: Told, raw: str, base: str, base_digest: str, epoch_s: int, context: Path) -> None:
    """Run docker build without a network; raises DockerFailed."""
    say("building, without a network")
    arguments = [
        ("BASE_IMAGE", base),
        ("VARIANT", told.variant),
        ("SOURCE_DATE_EPOCH", str(epoch_s)),
        ("VERSION", version()),
        ("REVISION", git("rev-parse", "HEAD")),
        ("CREATED", datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")),
        ("BASE_DIGEST", base_digest),
    ]
    clean = ["--no-cache"] if told.clean else []
    docker("build", "--network", "none", *clean, *options(arguments, "--build-arg"), "-t", raw, str(context))


def rewrite(raw: str, tag: str, folder: Path, epoch_s: int) -> tuple[archive.Identity, dict[str, int]]:
    """Save, rewrite and load an image under its final name; return what it is and what its bytes are."""
    saved, plain = folder / "saved.tar", folder / "plain.tar"
    docker("save", "--output", str(saved), raw)
    identity = archive.normalise(saved, plain, tag, epoch_s)
    saved.unlink()
    docker("load", stdin=plain)
    docker("rmi", raw)
    with Image(plain) as image:
        return identity, parts(image.files())


def version() -> str:
    """Return the project's version."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def source_epoch_s() -> int:
    """Return SOURCE_DATE_EPOCH, or the time of the last commit."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct"))


def git(*arguments: str) -> str:
    """Return what one git command says of this checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def architecture() -> str:
    """Return this machine's processor as images name it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


def say(line: str) -> None:
    print(f"image: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
