"""The text that quality is measured on, as windows of token ids.

Owns: the default text, its digest, the cut into windows.
Must not know: models, metrics.
Invariant: the same text and tokenizer give the same windows; nothing is dropped but an incomplete last one.

The default is the reference text that CPython carries for its `help()` (`pydoc_data.topics`): English prose
with code in it, public, on every machine that runs this, no download. Its digest is part of the report,
because another release of Python words it differently.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

WINDOW_TOKENS: Final = 512
MAX_TEXT_BYTES: Final = 64 * 1024 * 1024


class TextRefused(Exception):
    """The text or the tokenizer cannot be used; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text with the name a reader of the report can find it by."""

    name: str
    content: str = field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the UTF-8 bytes, in hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def default_text() -> Text:
    """Return the topics of Python's own help, in alphabetical order."""
    from pydoc_data.topics import topics  # 700 kB of text: read only when it is wanted

    content = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return Text(f"pydoc_data.topics of CPython {platform.python_version()}", content)


def read_text(path: Path) -> Text:
    """Return the UTF-8 text in `path`; raises TextRefused."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TextRefused(f"the text file cannot be read ({error.strerror})") from None
    if len(raw) > MAX_TEXT_BYTES:
        raise TextRefused(f"the text has {len(raw)} bytes, at most {MAX_TEXT_BYTES} are read")
    try:
        return Text(path.name, raw.decode())
    except UnicodeDecodeError:
        raise TextRefused("the text is not UTF-8") from None


def windows(
    text: Text, tokenizer_json: bytes, tokens: int, window_tokens: int = WINDOW_TOKENS
) -> list[list[int]]:
    """Return about `tokens` tokens of `text` in windows of `window_tokens`, spread evenly over the text.

    Raises TextRefused when the text is too short for one window or the tokenizer is not readable.
    """
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise TextRefused(f"`tokenizer.json` is not readable ({type(error).__name__})") from None
    ids = tokenizer.encode(text.content, add_special_tokens=False).ids
    whole = len(ids) // window_tokens
    wanted = min(whole, max(1, tokens // window_tokens))
    if not whole:
        raise TextRefused(f"the text has {len(ids)} tokens, one window needs {window_tokens}")
    firsts = [index * whole // wanted * window_tokens for index in range(wanted)]
    return [ids[first : first + window_tokens] for first in firsts]
