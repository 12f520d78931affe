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
from functools import partial
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
from sagemaker_entry.release import package_version
from sagemaker_entry.sealed import board
from sagemaker_entry.service import Engine, Model, Service
from sagemaker_entry.sessions import Sessions
from sagemaker_entry.settings import Settings
from sagemaker_entry.unlocking import Unlocking

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
    serving: Callable[[], None],
    *,
    sessions: Sessions | None = None,
    engine: Engine | None = None,
    load_text: LoadText = TextModel.load,
    board_fd: int | None = None,
    unlock_fd: int | None = None,
) -> Any:
    """Return the WSGI callable; raises SystemExit when the key file cannot be read.

    `serving` is called once, when requests can be taken.
    """
    health = Health(
        HeartbeatReader(heartbeat_fd),
        metrics,
        lockdown=settings.lockdown == "on",
        sealed=board_fd is not None,
    )
    service = Service(settings, engine or EngineClient(door_fd), metrics, health.full_s)
    facts = ServerFacts(package_version(), fingerprint(settings), settings.max_concurrent_requests)
    try:
        key = read_key(settings.api_key_file)
    except (OSError, ValueError) as error:
        log.write("error", "api_key_unreadable", kind=type(error).__name__)
        sys.exit(EXIT_UNUSABLE)
    unlocking = None if unlock_fd is None else Unlocking(unlock_fd, health)
    app = App(settings, service, health, metrics, facts, int(time.time()), key, sessions, unlocking)
    read = (
        partial(model_files.read, settings.model) if board_fd is None else partial(opened, board_fd, health)
    )
    gevent.spawn(load, service, read, load_text, lambda: health.error() is None)
    gevent.spawn(announce, lambda: health.error() is None, serving)
    return app.wsgi


def announce(healthy: Callable[[], bool], serving: Callable[[], None]) -> None:
    """Call `serving` once requests can be taken."""
    while not healthy():
        gevent.sleep(ENGINE_POLL_S)
    serving()


def opened(board_fd: int, health: Health) -> dict[str, bytes]:
    """Return the small files of a sealed model once the engine has opened it, and note its licence."""
    while (told := board.read(board_fd)) is None:
        gevent.sleep(ENGINE_POLL_S)
    if told.licence is not None:
        health.licence_end_s = told.licence.not_after_s
    return told.files


def load(
    service: Service,
    read: Callable[[], dict[str, bytes]],
    load_text: LoadText,
    healthy: Callable[[], bool],
) -> None:
    """Load the text model; files may still be on their way, so it is tried ATTEMPTS times.

    `healthy` tells whether requests can be taken. Raises SystemExit after the last attempt: a worker that can
    never answer must not stay behind the port.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            files = read()
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


def fingerprint(settings: Settings) -> str:
    """Return a short digest of model and configuration, in place of a revision."""
    facts = [settings.name, settings.dtype, package_version()]
    named = "config.json" if settings.allow_plaintext == "on" else "manifest.json"  # hashed, not believed
    config = Path(settings.model, named)
    digest = hashlib.sha256("\n".join(facts).encode())
    if config.is_file() and os.access(config, os.R_OK):
        digest.update(config.read_bytes())
    return "fp_" + digest.hexdigest()[:12]
