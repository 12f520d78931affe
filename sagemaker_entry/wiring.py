"""One worker's parts put together, after gevent has patched the standard library.

Owns: which concrete part fills which place. Must not know: what the parts do.
Invariant: nothing here blocks the start; the text model loads while the worker already answers 503.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gevent

from container.ranks.client import EngineClient
from container.ranks.heartbeat import HeartbeatReader
from container.text.errors import TextError
from container.text.grammar_check import GrammarChecker
from container.text.grammar_errors import GrammarError
from container.text.model import TextModel
from sagemaker_entry import log, model_files
from sagemaker_entry.app import App
from sagemaker_entry.children import EXIT_UNUSABLE
from sagemaker_entry.dialects.listings import ServerFacts
from sagemaker_entry.health import Health
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.service import Engine, Model, Service
from sagemaker_entry.settings import Settings

ATTEMPTS = 5
RETRY_S = 2.0
ENGINE_POLL_S = 0.1  # a look at a page in memory
MAX_KEY_BYTES = 4096

LoadText = Callable[[dict[str, bytes]], Model]


def build(
    settings: Settings,
    door_fd: int,
    heartbeat_fd: int,
    metrics: Metrics,
    *,
    engine: Engine | None = None,
    load_text: LoadText = TextModel.load,
) -> Any:
    """Return the WSGI callable; raises SystemExit when the key file cannot be read."""
    health = Health(HeartbeatReader(heartbeat_fd), metrics)
    service = Service(settings, engine or EngineClient(door_fd), metrics, health.full_s)
    facts = ServerFacts(package_version(), fingerprint(settings), settings.max_concurrent_requests)
    try:
        key = read_key(settings.api_key_file)
    except (OSError, ValueError) as error:
        log.write("error", "api_key_unreadable", kind=type(error).__name__)
        sys.exit(EXIT_UNUSABLE)
    app = App(settings, service, health, metrics, facts, int(time.time()), key)
    gevent.spawn(load, service, settings.model, load_text, lambda: health.error() is None)
    return app.wsgi


def load(service: Service, model_dir: str, load_text: LoadText, healthy: Callable[[], bool]) -> None:
    """Load the text model; files may still be on their way, so it is tried ATTEMPTS times.

    `healthy` tells whether requests can be taken. Raises SystemExit after the last attempt: a worker that can
    never answer must not stay behind the port.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            files = model_files.read(model_dir)
            text = load_text(files)
            # runs before whoever waits for the text model
            gevent.spawn(warm, service, files, text, healthy)
            service.ready(text, model_files.default_sampling(files))
        except Exception as error:  # noqa: BLE001  whatever it is, without a tokenizer there is no service
            code = error.code.value if isinstance(error, TextError) else type(error).__name__
            log.write("error", "text_model_failed", code=code, attempt=attempt)
        else:
            log.write("info", "text_model_loaded")
            return
        if attempt < ATTEMPTS:
            gevent.sleep(RETRY_S)
    sys.exit(EXIT_UNUSABLE)


def warm(service: Service, files: Mapping[str, bytes], text: Model, healthy: Callable[[], bool]) -> None:
    """Start the process that checks grammars before the first request needs it.

    It waits until the engine has said that it follows grammars: for one that does not, the process would hold
    its own copy of the tokenizer for nothing.
    """
    service.grammars.ready(GrammarChecker(files["tokenizer.json"], text.eos_token_ids))
    while (offered := service.offers_grammars() if healthy() else None) is None:
        gevent.sleep(ENGINE_POLL_S)
    if not offered:
        return
    try:
        service.grammars.start()
    except GrammarError as error:
        log.write("warning", "grammars_unavailable", code=error.reason.value)


def read_key(path: str | None) -> str | None:
    """Return the first line of the key file, None when none is configured; raises OSError, ValueError."""
    if path is None:
        return None
    with Path(path).open("rb") as file:
        key = file.read(MAX_KEY_BYTES).splitlines()[:1]
    if not key or not key[0].strip():
        raise ValueError("the API key file is empty")
    return key[0].decode("utf-8").strip()


def package_version() -> str:
    """Return the version of the installed package, or of none."""
    try:
        return version("strongroom")
    except PackageNotFoundError:
        return "0"


def fingerprint(settings: Settings) -> str:
    """Return a short digest of model and configuration, in place of a revision."""
    facts = [settings.name, settings.dtype, package_version()]
    config = Path(settings.model, "config.json")
    digest = hashlib.sha256("\n".join(facts).encode())
    if config.is_file() and os.access(config, os.R_OK):
        digest.update(config.read_bytes())
    return "fp_" + digest.hexdigest()[:12]
