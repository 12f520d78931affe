"""Work that would stop the event loop, done in a thread beside it.

Owns: what counts as an outcome there. Must not know: what the work is.
Invariant: an error meant for the client comes back as a value and is raised by the caller: gevent reports an
exception that leaves a thread as a failure of the server, whatever the caller makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gevent

from sagemaker_entry.errors import ApiError

T = TypeVar("T")


def beside(call: Callable[..., T], *arguments: Any) -> T:
    """Return `call(*arguments)`, computed in a thread while other greenlets run; raises as it does."""
    outcome = gevent.get_hub().threadpool.apply(_outcome, (call, arguments))
    if isinstance(outcome, ApiError):
        raise outcome
    result: T = outcome
    return result


def _outcome(call: Callable[..., T], arguments: tuple[Any, ...]) -> T | ApiError:
    try:
        return call(*arguments)
    except ApiError as error:
        return error
