"""The emulator in the foreground.

Owns: what is printed for the shell, waiting for the end. Must not know: how the emulator works.
Invariant: Ctrl-C and SIGTERM close the emulator before the process ends.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from infra.emulator import LOCAL_KEYS, LOCAL_REGION, Emulator, FolderStore, Limits, S3Store
from infra.emulator.stores import Store
from infra.report import CommandError, ExitCode, Result


def open_emulator(
    upstream: str,
    endpoint: str,
    port: int,
    components: list[str],
    strict: bool,
    split: str,
    body_limit_bytes: int,
    store: str | None = None,
    async_output: str | None = None,
    fail_after_parts: int | None = None,
) -> Emulator:
    """Return a running emulator; raises CommandError for bad arguments or a taken port."""
    try:
        return Emulator(
            upstream,
            endpoint,
            port,
            components=dict(_component(text, upstream) for text in components),
            strict=strict,
            split=split,
            limits=Limits(body_bytes=body_limit_bytes),
            store=None if store is None else _store(store),
            async_output=async_output,
            notify=None if async_output is None else _told,
            fail_after_parts=fail_after_parts,
        )
    except ValueError as error:
        raise CommandError(ExitCode.USAGE, "bad_argument", str(error)) from error
    except OSError as error:
        raise CommandError(
            ExitCode.ENVIRONMENT_MISSING,
            "port_taken",
            f"cannot listen on port {port}",
            "choose another --port",
        ) from error


def describe(emulator: Emulator, endpoint: str) -> Result:
    """Return what a client needs to use `emulator`. Keys and token are dummies that open nothing else."""
    return {
        "url": emulator.url,
        "endpoint": endpoint,
        "openai_base_url": emulator.openai_base_url(),
        "token": emulator.token(),
        "environment": {
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": emulator.url,
            **({"AWS_ENDPOINT_URL_SAGEMAKER": emulator.url} if emulator.has_store else {}),
            "AWS_ACCESS_KEY_ID": LOCAL_KEYS.access_key_id,
            "AWS_SECRET_ACCESS_KEY": LOCAL_KEYS.secret_access_key,
            "AWS_DEFAULT_REGION": LOCAL_REGION,
        },
    }


def show(result: Result) -> None:
    """Print lines for a shell; all of them can be evaluated."""
    for name, value in result["environment"].items():
        print(f"export {name}={value}")
    print(f"export OPENAI_BASE_URL={result['openai_base_url']}")
    print(f"export OPENAI_API_KEY={result['token']}", flush=True)


@contextlib.contextmanager
def serving(emulator: Emulator) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets; close `emulator` at the end, after a Ctrl-C too."""
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    before: Any = signal.signal(signal.SIGTERM, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)
        emulator.close()


def _store(place: str) -> Store:
    """Return the folder `place`, or the S3 at that URL, reached with the environment's credentials."""
    if place.startswith(("http://", "https://")):
        import boto3

        return S3Store(boto3.client("s3", endpoint_url=place))
    root = Path(place)
    if not root.is_dir():
        raise ValueError("`store` must be a folder that exists, or the URL of an S3")
    return FolderStore(root)


def _told(document: dict[str, Any]) -> None:
    """Print a notification as one line: it names objects, never what they hold."""
    print(json.dumps({"notification": document}), file=sys.stderr, flush=True)


def _component(text: str, upstream: str) -> tuple[str, str]:
    """Return name and address of `NAME` (the endpoint's own container) or `NAME=HOST:PORT`."""
    name, equals, address = text.partition("=")
    return name, address if equals else upstream
