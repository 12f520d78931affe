"""Text to ids with a tokenizer that knows no control token.

Owns: the rewritten native tokenizer, the border between segments, the last check.
Must not know: templates, which cuts are right.
Invariant: the control ids of a result are those of the cuts, in their order, and no others.

    text     <|im_start|>user hello<|im_end|> bye          cuts: [0, 12) and [22, 32)
    native   |border|user hello|border| bye                one call
    ids      [1] [...] [2] [...]
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer

from container.text.errors import TextCode, TextError, fenced, utf8_length
from container.text.segments import Cut
from container.text.vocabulary import SECRET_BYTES, Vocabulary


class TokenSpan(NamedTuple):
    """A token and the characters [start, stop) of the input it stands for; empty for added tokens."""

    id: int
    text: str
    start: int
    stop: int


class Encoder:
    """Encodes text between cuts. Safe to call from many threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises TextError(FILE_MALFORMED) when the library refuses the definition or ids clash."""
        self._control_ids: Final = vocabulary.control_ids
        self._tokenizer = fenced(TextCode.FILE_MALFORMED, Tokenizer.from_str, vocabulary.plain)
        # A border also keeps what follows from being "first in the text", where sentencepiece adds a space:
        # a control token has the same effect in an ordinary tokenizer.
        self._border = "\ufdd0" + secrets.token_hex(SECRET_BYTES)
        self._tokenizer.add_tokens([AddedToken(self._border, normalized=False)])
        border_id = self._tokenizer.token_to_id(self._border)
        if border_id is None or (
            border_id < len(vocabulary.pieces) and vocabulary.pieces[border_id] is not None
        ):
            raise TextError(TextCode.FILE_MALFORMED)
        self._border_id = border_id

    def ids(self, text: str, cuts: Sequence[Cut] = ()) -> list[int]:
        """Return the ids of `text`, with the tokens of `cuts` in their places.

        Raises TextError (lone surrogate, tokenizer failed, control token).
        """
        ids: list[int] = self._encode(text, cuts).ids
        if not cuts:
            return ids
        tokens = iter(cuts)
        return [next(tokens).id if token == self._border_id else token for token in ids]

    def spans(self, text: str, cuts: Sequence[Cut] = ()) -> list[TokenSpan]:
        """Return the same ids with the characters of `text` they stand for."""
        encoding = self._encode(text, cuts)
        tokens = iter(cuts)
        shift = 0  # from places in the joined segments to places in `text`
        spans = []
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self._border_id:
                cut = next(tokens)
                shift = cut.stop - stop
                span = TokenSpan(cut.id, text[cut.start : cut.stop], cut.start, cut.stop)
            else:
                span = TokenSpan(token, text[start + shift : stop + shift], start + shift, stop + shift)
            spans.append(span)
        return spans

    def _encode(self, text: str, cuts: Sequence[Cut]) -> Encoding:
        utf8_length(text)
        joined = self._border.join(_between(text, cuts)) if cuts else text
        encoding = fenced(TextCode.TOKENIZER_FAILED, self._tokenizer.encode, joined, add_special_tokens=False)
        ids = encoding.ids
        if ids.count(self._border_id) != len(cuts):
            raise TextError(TextCode.TOKENIZER_FAILED)
        if not self._control_ids.isdisjoint(ids):
            raise TextError(TextCode.CONTROL_TOKEN)
        return encoding


def _between(text: str, cuts: Sequence[Cut]) -> list[str]:
    starts = [0, *(cut.stop for cut in cuts)]
    stops = [*(cut.start for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
