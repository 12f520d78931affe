"""The demo inside the hardened image: the same two calls, for every way in and every kind of user.

Owns: which runs there are, what each must show beside the answer. Must not know: how a call is made.
Invariant: every run has a read-only root, no capability (root: the two it needs to become somebody else), no
new privileges, limits of processes and memory, and a /tmp from which nothing can be executed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.image import build, wheelhouse
from infra.image.docker import DockerFailed, run
from infra.image.serving import NeverHealthy, Serving, Way, flags_of
from scripts.progress import say

SERVICE = 10001
KEY = "/run/secrets/key"  # where the container sees it
FAILURES = (DockerFailed, NeverHealthy, wheelhouse.WheelRefused, build.BaseRefused)
Calls = Callable[[str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Model:
    """A directory to serve, and what opens it where it is sealed: the key's file and what else is told."""

    path: Path
    key: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def users() -> dict[str, tuple[str | None, int]]:
    """Return kind -> (what docker is told, who the processes must be)."""
    stranger = random.randint(20_000, 2**31 - 2)
    return {
        "its own user": (None, SERVICE),
        "a random user": (f"{stranger}:{stranger}", stranger),
        "root": ("0", SERVICE),  # it gives that up before it reads anything
    }


def in_the_image(
    model: Model, tag: str, calls: Calls, sound: Callable[[dict[str, Any]], bool]
) -> tuple[bool, dict[str, Any]]:
    """Serve with the image six times; return whether all went well and alike, and the report."""
    image = tag or available()
    runs = [one(image, model, way, kind, *told, calls) for way in Way for kind, told in users().items()]
    replies = {run["reply"] for run in runs}
    ok = len(replies) == 1 and all(sound(run) and not run["wrong"] for run in runs)
    return ok, {
        "image": image,
        "sealed": model.key is not None,
        "reply": sorted(replies)[0],
        "runs": runs,
    }


def available() -> str:
    """Return the name of this version's image, built now where it is missing."""
    name = f"{build.NAME}:{build.version()}-cpu"
    if run("inspect", "--type", "image", name).returncode != 0:
        say(f"building {name} (some minutes)")
        build.build(build.Told("cpu", "", name, build.ROOT / ".cache" / "image", clean=False))
    return name


@contextlib.contextmanager
def key_of(model: Model, owner: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield mounts and settings that let user `owner`, and nobody else in the container, read the key."""
    if model.key is None:
        yield [], dict(model.environment)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "key")
        shutil.copyfile(model.key, copy)
        copy.chmod(0o400)
        os.chown(copy, owner, owner)
        yield [f"{copy}:{KEY}:ro"], {**model.environment, "STRONGROOM_KEY": f"file:{KEY}"}


def one(
    image: str, model: Model, way: Way, kind: str, user: str | None, expected: int, calls: Calls
) -> dict[str, Any]:
    """Serve once; return what the calls gave and what was wrong beside them."""
    say(f"the image, over {way.value}, as {kind}")
    with (
        key_of(model, expected) as (mounts, environment),
        Serving(image, model.path, way, user, mounts=mounts, environment=environment) as served,
    ):
        say(f"healthy after {served.start_s:.1f} s")
        shown = served.get("/ping")[1]
        given = calls(served.upstream)
        seen: dict[str, Any] = {"lockdown": shown.get("Strongroom-Lockdown")}
        seen |= {"seal": shown.get("Strongroom-Seal"), "ports": served.ports(), "users": served.users()}
        seen["changed_files"] = served.changes()
        flags = flags_of(served.container)
        seen["exit"], stopped_s = served.container.stop()
    return {
        "way": way.value,
        "as": kind,
        **given,
        **seen,
        "wrong": wrong(seen, way, expected, sealed=model.key is not None),
        "flags": flags,
        "start_s": round(served.start_s, 2),
        "stop_s": round(stopped_s, 2),
    }


def wrong(seen: dict[str, Any], way: Way, expected: int, *, sealed: bool) -> list[str]:
    """Return the names of what is not as it must be."""
    right = {
        "lockdown": "on",
        "seal": "sealed" if sealed else "plaintext",
        "ports": 0 if way is Way.SOCKET else 1,
        "users": [expected],
        "changed_files": [],
        "exit": 0,
    }
    return [name for name, value in right.items() if seen[name] != value]
