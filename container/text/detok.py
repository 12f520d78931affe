"""Token ids to text, one id at a time.

Owns: reading the decoder of tokenizer.json; assembling characters from bytes.
Must not know: stop strings, requests, which ids a client may see.
Invariant: text that was returned is final, whole characters only; time is linear in the tokens.

Nearly every vocabulary spells bytes: byte-level BPE, and sentencepiece with byte fallback. For these each
id has its bytes and one incremental UTF-8 decoder does the rest, exactly. Any other decoder is run over a
short window of ids, and what it says more than before is new (the way of TGI and vLLM).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

WINDOW_TOKENS: Final = 6  # context for decoders that look back, as in TGI
HELD_TOKENS: Final = 8  # an unfinished character is given up after this many more ids
PROMPT_TOKENS: Final = 8  # of the prompt's end; a character has at most 3 unfinished bytes
REPLACEMENT: Final = "\ufffd"
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Assembles one sequence."""

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty inside a character and for unknown ids."""

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for an unfinished character."""

    @property
    def pending(self) -> bool:
        """True when bytes wait for the rest of their character."""


@dataclass(frozen=True, slots=True)
class ByteRules:
    """How pieces of this vocabulary turn into bytes."""

    piece: Callable[[str], bytes]
    first_piece: Callable[[str], bytes]  # of the first visible token of a text
    leading_spaces: int  # dropped at the start of a text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET: Final = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()  # an added token in its own spelling


def byte_rules(decoder: Any) -> ByteRules | None:
    """Return the rules that the `decoder` of a tokenizer.json amounts to, None when they are not per byte."""
    if not isinstance(decoder, dict):
        return None
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return None
    names = [step.get("type") for step in steps]
    if names == ["ByteLevel"]:
        return ByteRules(_byte_level, _byte_level, 0)
    return _sentencepiece(steps, names)


def _sentencepiece(steps: list[dict[str, Any]], names: list[Any]) -> ByteRules | None:
    """Rules for [Replace]* [ByteFallback] [Metaspace] [Fuse] [Strip], the orders in which they occur."""
    order = ["Replace", "ByteFallback", "Metaspace", "Fuse", "Strip"]
    if any(name not in order for name in names) or names != sorted(names, key=order.index):
        return None
    if len(set(names) - {"Replace"}) != len([name for name in names if name != "Replace"]):
        return None
    replaces: list[tuple[str, str]] = []
    fallback = False
    first_drops = ""
    leading_spaces = 0
    for step, name in zip(steps, names, strict=True):
        match name:
            case "Replace":
                pattern = step.get("pattern")
                if not (isinstance(pattern, dict) and isinstance(pattern.get("String"), str)):
                    return None
                replaces.append((pattern["String"], str(step.get("content", ""))))
            case "ByteFallback":
                fallback = True
            case "Metaspace":
                mark = str(step.get("replacement", "\u2581"))
                replaces.append((mark, " "))
                if step.get("prepend_scheme", "always") != "never":
                    first_drops = mark
            case "Strip":
                if "Fuse" not in names or step.get("content") != " " or step.get("stop"):
                    return None  # without Fuse it strips every piece; at the end it cannot be done as we go
                leading_spaces = int(step.get("start", 0))

    def piece(text: str) -> bytes:
        if fallback and (byte := _BYTE_PIECE.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        for old, new in replaces:
            text = text.replace(old, new)
        return text.encode()

    def first_piece(text: str) -> bytes:
        return piece(text.replace(first_drops, "") if first_drops else text)

    return ByteRules(piece, first_piece, leading_spaces)


class ByteTable:
    """The bytes of every id, worked out once each and shared by all sequences of a model."""

    def __init__(self, rules: ByteRules, pieces: Sequence[str | None]) -> None:
        self.rules = rules
        self._pieces = pieces
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """Return the bytes of `token` inside a text; empty for ids without a piece."""
        data = self._known.get(token)
        if data is None:
            piece = self._piece(token)
            if piece is None:
                return b""  # not kept: a client can name any number
            data = self._known[token] = self.rules.piece(piece)
        return data

    def of_first(self, token: int) -> bytes:
        """Return the bytes of `token` at the start of a text."""
        piece = self._piece(token)
        return b"" if piece is None else self.rules.first_piece(piece)

    def _piece(self, token: int) -> str | None:
        return self._pieces[token] if 0 <= token < len(self._pieces) else None


class ByteDetokenizer:
    """For vocabularies with ByteRules."""

    def __init__(self, table: ByteTable, prompt: Sequence[int], skip: frozenset[int]) -> None:
        """`prompt` comes before what is pushed; ids in `skip` do not count as text in it."""
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._spaces_to_drop = table.rules.leading_spaces
        for token in (token for token in prompt[-PROMPT_TOKENS:] if token not in skip):
            self.push(token)
        if any(token not in skip for token in prompt):
            self._first = False
            self._spaces_to_drop = 0

    def push(self, token: int) -> str:
        if self._first:
            data = self._table.of_first(token)
            self._first = not self._table.of(token)
        else:
            data = self._table.of(token)
        return self._visible(self._decoder.decode(data))

    def _visible(self, text: str) -> str:
        if text and self._spaces_to_drop:
            kept = text.removeprefix(" ")
            self._spaces_to_drop = self._spaces_to_drop - 1 if len(kept) < len(text) else 0
            return self._visible(kept)
        return text

    def flush(self) -> str:
        return self._visible(self._decoder.decode(b"", final=True))

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])


class WindowDetokenizer:
    """For any other decoder: decode a window with and without the new id, and take the difference."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], skip: frozenset[int]
    ) -> None:
        """`decode` keeps special tokens; `prompt` and `skip` as above."""
        self._decode = decode
        self._ids = [token for token in prompt[-WINDOW_TOKENS:] if token not in skip]
        self._read = len(self._ids)  # ids[:read] are out already
        self._before = decode(self._ids) if self._ids else ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read <= HELD_TOKENS:
            return ""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._before) :]
        self._ids = self._ids[-WINDOW_TOKENS:]
        self._read = len(self._ids)
        self._before = self._decode(self._ids)
        return new

    def flush(self) -> str:
        return self._advance(self._decode(self._ids)) if self.pending else ""

    @property
    def pending(self) -> bool:
        return self._read < len(self._ids)
