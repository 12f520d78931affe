"""Every way the text room can fail: one exception, a closed list of codes.

Owns: the codes and the fence round native calls.
Must not know: HTTP, the client-visible error table, the text that failed.
Invariant: an error holds a code and nothing else; no text, no library's message, no chained exception.

    TextError
    |- carries one TextCode
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class TextCode(enum.StrEnum):
    """Closed list of reasons. The first group is the client's doing, the second the model's files'."""

    LONE_SURROGATE = "lone_surrogate"  # a string that has no UTF-8 form
    CONTROL_TOKEN = (
        "control_token"  # text would have become a control id; refused as the last line of defence
    )
    TOO_LARGE = "too_large"  # more bytes than the template child is given
    RESERVED_NAME = "reserved_name"  # a template argument that would hide one of ours
    NO_TEMPLATE = "no_template"
    TEMPLATE_FAILED = "template_failed"  # the template refused these messages, or ran out of memory
    TEMPLATE_TIMEOUT = "template_timeout"
    TOKENIZER_FAILED = "tokenizer_failed"  # a native call failed or panicked

    FILE_MISSING = "file_missing"
    FILE_TOO_LARGE = "file_too_large"
    FILE_MALFORMED = "file_malformed"
    REMOTE_CODE = "remote_code"  # `auto_map`: files that ask for their own Python
    TEMPLATE_UNSAFE = "template_unsafe"  # its control tokens cannot be traced to its own text


class TextError(Exception):
    """Raised by everything in this room; `code` is all there is to know."""

    def __init__(self, code: TextCode) -> None:
        super().__init__(code.value)
        self.code = code


def fenced(code: TextCode, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Return `call(...)`; whatever it raises becomes TextError(code) without text or context.

    A Rust panic arrives as `PanicException`, which is a BaseException but no Exception, and no public name
    exists to catch it by. KeyboardInterrupt, SystemExit and greenlet exits pass through.
    """
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
    raise TextError(code)  # outside the handler, so that the library's exception is not kept as context


def utf8_length(text: str) -> int:
    """Return the UTF-8 length of `text` in bytes; raises TextError(LONE_SURROGATE) when it has none."""
    if text.isascii():
        return len(text)
    size_bytes = None
    with contextlib.suppress(UnicodeEncodeError):  # its exception would carry the text
        size_bytes = len(text.encode())
    if size_bytes is None:
        raise TextError(TextCode.LONE_SURROGATE)
    return size_bytes
