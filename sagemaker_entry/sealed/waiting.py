"""The engine's end of unlocking by invocation: it waits for its key and takes the right one, once.

Owns: the waiting, and what each call comes to.
Must not know: HTTP, the message's form (model_package.unlock's).
Invariant: a key that does not fit changes nothing; the key that fits is kept for later engines before the
caller is told.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Final

from container.ranks.door import answer
from model_package import keeping, schedule
from model_package.manifest import Manifest
from model_package.outcome import PackageError
from model_package.refusal import KeyRefused
from model_package.secret import wipe
from model_package.unlock import Container
from sagemaker_entry.sealed.wire import MAX_CALL_BYTES, Status, Verb, until_end

BEAT_S: Final = 0.5
PATIENCE_S: Final = 2.0  # with a worker that has knocked and says nothing


def wait(
    manifest: Manifest, image_version: str, unlock_fd: int, key_fd: int, beat: Callable[[], None]
) -> bytearray:
    """Return the data key once the right one has come; it is in the page behind `key_fd`, too.

    `beat` is called at least every BEAT_S. Raises KeyRefused where the key cannot be kept.
    """
    container = Container(manifest.as_base, image_version)
    poll = select.poll()
    poll.register(unlock_fd, select.POLLIN)
    try:
        while True:
            beat()
            if not poll.poll(BEAT_S * 1000):
                continue
            data_key: bytearray | None = None
            for connection in answer(unlock_fd):
                with connection:  # who called after the key had come hears nothing, and may try again
                    if data_key is None:
                        data_key = _serve(connection, container, manifest, key_fd)
            if data_key is not None:
                return data_key
    finally:
        container.close()


def _serve(
    connection: socket.socket, container: Container, manifest: Manifest, key_fd: int
) -> bytearray | None:
    """Answer one call; return the data key if it brought it."""
    connection.settimeout(PATIENCE_S)
    data_key: bytearray | None = None
    try:
        call = until_end(connection, MAX_CALL_BYTES)
        if call[:1] == Verb.DESCRIBE.value:
            reply = Status.DONE.value + container.describe()
        else:
            data_key, reply = _unlock(container, manifest, call[1:], key_fd)
        connection.sendall(reply)
    except OSError:  # the worker has gone; a key that fitted counts all the same
        return data_key
    return data_key


def _unlock(
    container: Container, manifest: Manifest, message: bytes, key_fd: int
) -> tuple[bytearray | None, bytes]:
    """Return the data key if it fits, kept for later engines, and what to answer."""
    data_key = bytearray(0)
    try:
        data_key = container.open_message(message, manifest)
        package_id, committed = bytes.fromhex(manifest.package_id), bytes.fromhex(manifest.commitment)
        schedule.check_commitment(data_key, package_id, committed)
        keeping.fill(key_fd, data_key)
    except KeyRefused as error:
        refusal = error.refusal.value
    except PackageError as error:
        refusal = error.outcome.value
    else:
        return data_key, Status.DONE.value
    wipe(data_key)
    return None, Status.REFUSED.value + refusal.encode()
