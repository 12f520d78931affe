"""Log lines: one JSON object per line on stderr, numbers and words of our own only.

Owns: the line's form, the level filter, the logger classes that keep libraries quiet.
Must not know: requests, prompts. Callers pass event names and plain values; content never reaches a call.
Invariant: one event is one line; every control character is escaped, whatever a value holds.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Final

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
MAX_VALUE_CHARS: Final = 256

_state = {"level": LEVELS["info"], "fd": 2}


def set_level(level: str, fd: int = 2) -> None:
    """Write lines of `level` and above to file descriptor `fd`."""
    _state.update(level=LEVELS[level], fd=fd)


def write(level: str, event: str, **values: str | int | float | bool | None) -> None:
    """Write one line; strings are cut at MAX_VALUE_CHARS and escaped to ASCII."""
    if LEVELS[level] < _state["level"]:
        return
    line = {"time": round(time.time(), 3), "level": level, "event": event, "pid": os.getpid()}
    for name, value in values.items():
        line[name] = value[:MAX_VALUE_CHARS] if isinstance(value, str) else value
    # ensure_ascii escapes everything outside 0x20..0x7e but DEL, which some terminals act on
    text = json.dumps(line, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")
    try:
        os.write(_state["fd"], text.encode() + b"\n")
    except OSError:
        # Nobody reads our log any more; serving goes on.
        _state["level"] = 100


class QuietLogger:
    """What gunicorn calls its logger: lifecycle by event code only, no messages, no access log.

    gunicorn's own messages carry request lines, header values and tracebacks.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg

    def critical(self, *_: Any, **__: Any) -> None:
        write("error", "arbiter_critical")

    def error(self, *_: Any, **__: Any) -> None:
        write("warning", "arbiter_error")

    def warning(self, *_: Any, **__: Any) -> None:
        write("warning", "arbiter_warning")

    def exception(self, *_: Any, **__: Any) -> None:
        write("error", "arbiter_exception", kind=exception_name())

    def info(self, *_: Any, **__: Any) -> None:
        """Lifecycle chatter; our own processes report theirs."""

    def debug(self, *_: Any, **__: Any) -> None:
        """As `info`."""

    def log(self, *_: Any, **__: Any) -> None:
        """As `info`."""

    def access(self, *_: Any) -> None:
        """Requests are logged by the connection, with the route's template instead of the path."""

    def reopen_files(self) -> None:
        """There are no files."""

    def close_on_exec(self) -> None:
        """There are no files."""


def exception_name() -> str:
    """Return the type of the exception being handled, and where it arose in our code, without its text."""
    kind, _, trace = sys.exc_info()
    if kind is None:
        return "none"
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if trace.tb_frame.f_globals.get("__name__", "").startswith(("sagemaker_entry", "container")):
            place = f" in {trace.tb_frame.f_globals['__name__']}:{trace.tb_lineno} ({code.co_name})"
        trace = trace.tb_next
    return kind.__name__ + place


def silence_libraries() -> None:
    """Keep every library logger from writing: their messages may hold what a client sent."""
    root = logging.getLogger()
    root.handlers[:] = [logging.NullHandler()]
    root.setLevel(logging.CRITICAL)
    logging.raiseExceptions = False
    logging.lastResort = None
