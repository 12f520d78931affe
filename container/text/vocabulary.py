"""Which ids steer the model, and a tokenizer definition in which text cannot reach them.

Owns: the control tokens, the table of pieces, the rewritten ("plain") tokenizer.json.
Must not know: the tokenizers library, templates, requests.
Invariant: in the plain definition every control token is spelled with a secret drawn at load, in the
    vocabulary, the merges and the added tokens alike; ids stay. Text that spells `<|im_end|>` finds nothing.

Leaving the added tokens out would not do: ids after the base vocabulary would shift, a Unigram model would
still match `</s>` as an ordinary piece, and a BPE model with `ignore_merges` a whole word.
"""

from __future__ import annotations

import copy
import json
import secrets
from dataclasses import dataclass, field
from typing import Any, Final

from container.text.errors import TextCode, TextError
from container.text.files import Document, TextFiles

WORD_BOUNDARY_MARK: Final = "\u2581"  # a space, as sentencepiece writes it
SECRET_BYTES: Final = 16
MAX_VOCABULARY: Final = 4_000_000  # ids; a table of this length is built
# Names that steer; `unk_token` marks what the model has no piece for, which is ordinary text's business.
_UNKNOWN: Final = "unk_token"


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token only a template may write, with the flags that say how it matches."""

    id: int
    content: str = field(repr=False)
    special: bool  # hidden by `skip_special_tokens`
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the model's files say about ids."""

    pieces: tuple[str | None, ...] = field(repr=False)  # by id, as spelled in tokenizer.json; None: a hole
    controls: tuple[ControlToken, ...] = field(repr=False)
    control_ids: frozenset[int]  # no text ever becomes one of these
    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]
    full: str = field(repr=False)  # tokenizer.json, without truncation, padding and dropout
    plain: str = field(repr=False)  # the same with the control tokens out of reach

    @classmethod
    def build(cls, files: TextFiles) -> Vocabulary:
        """Raises TextError(FILE_MALFORMED) when ids contradict each other."""
        document = _prepared(files)
        ids = _ids(document)
        unknown = _unknown_piece(document["model"])
        steering = {ids[text] for name, text in files.named.items() if name != _UNKNOWN and text in ids}
        controls = _controls(files, document, ids)
        control_ids = {token.id for token in controls if token.content != unknown or token.id in steering}
        eos = {ids[text] for name, text in files.named.items() if name == "eos_token" and text in ids}
        pieces: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
        for text, token in ids.items():
            pieces[token] = text
        return cls(
            pieces=tuple(pieces),
            controls=controls,
            control_ids=frozenset(control_ids),
            special_ids=frozenset(token.id for token in controls if token.special),
            bos_id=ids.get(files.named.get("bos_token", "")),
            eos_ids=frozenset(eos | {token for token in files.end_ids if token < len(pieces)}),
            full=json.dumps(document, ensure_ascii=False),
            plain=json.dumps(_plain(document, controls), ensure_ascii=False),
        )


def _prepared(files: TextFiles) -> Document:
    """Return tokenizer.json plus the added tokens of tokenizer_config.json, free of batch settings."""
    document = dict(files.tokenizer)
    document["truncation"] = document["padding"] = None
    document["model"] = model = dict(document["model"])
    if "dropout" in model:
        model["dropout"] = None  # an augmentation for training; a prompt has one encoding
    known = {token["content"] for token in document["added_tokens"]}
    declared = files.config.get("added_tokens_decoder") or {}
    extra = []
    for key, value in declared.items() if isinstance(declared, dict) else ():
        if not (isinstance(value, dict) and isinstance(value.get("content"), str) and key.isdecimal()):
            raise TextError(TextCode.FILE_MALFORMED)
        if value["content"] and value["content"] not in known:
            extra.append(_added(int(key), value["content"], value))
    document["added_tokens"] = document["added_tokens"] + sorted(extra, key=lambda token: int(token["id"]))
    return document


def _added(token: int, content: str, flags: dict[str, Any]) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token, "content": content, **{name: bool(flags.get(name, False)) for name in names}}


def _ids(document: Document) -> dict[str, int]:
    """Return piece -> id over the model and the added tokens."""
    model = document["model"]
    entries = model["vocab"]
    ids: dict[str, int]
    if model["type"] == "Unigram":
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
            raise TextError(TextCode.FILE_MALFORMED)
        ids = {entry[0]: index for index, entry in enumerate(entries)}
    else:
        ids = dict(entries)
    for token in document["added_tokens"]:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise TextError(TextCode.FILE_MALFORMED)
    if not all(type(token) is int and 0 <= token < MAX_VOCABULARY for token in ids.values()):
        raise TextError(TextCode.FILE_MALFORMED)
    return ids


def _unknown_piece(model: Document) -> str | None:
    if model["type"] == "Unigram":
        index = model.get("unk_id")
        entries = model["vocab"]
        return entries[index][0] if isinstance(index, int) and 0 <= index < len(entries) else None
    piece = model.get("unk_token")
    return piece if isinstance(piece, str) else None


def _controls(files: TextFiles, document: Document, ids: dict[str, int]) -> tuple[ControlToken, ...]:
    """Return every added token and every named one, except runs of whitespace that are not special.

    Those runs are how some vocabularies spell indentation; they are ordinary text.
    """
    special = {*files.named.values(), *files.extra_special}
    found: dict[str, ControlToken] = {}
    for token in document["added_tokens"]:
        content = token["content"]
        is_special = bool(token.get("special")) or content in special
        if is_special or content.replace(WORD_BOUNDARY_MARK, " ").strip():
            flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
            found[content] = ControlToken(token["id"], content, is_special, **flags)
    for content in special:
        if content in ids:
            found.setdefault(content, ControlToken(ids[content], content, special=True))
    return tuple(sorted(found.values(), key=lambda token: token.id))


def _plain(document: Document, controls: tuple[ControlToken, ...]) -> Document:
    """Return `document` with every control token respelled; ids and all other pieces stay."""
    spelled = {token.content: "\ufdd0" + secrets.token_hex(SECRET_BYTES) for token in controls}
    plain = dict(document)
    plain["model"] = model = dict(document["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [[spelled.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {spelled.get(piece, piece): token for piece, token in model["vocab"].items()}
        if model.get("unk_token") in spelled:
            model["unk_token"] = spelled[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, spelled)]
    added = copy.deepcopy(document["added_tokens"])
    for token in added:
        if token["content"] in spelled:
            token["content"] = spelled[token["content"]]
            token["normalized"] = False  # no normalizer may turn text into a secret, or a secret into text
    plain["added_tokens"] = added
    return plain


def _touches(merge: object, spelled: dict[str, str]) -> bool:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(pair, list) and len(pair) == 2):
        raise TextError(TextCode.FILE_MALFORMED)
    left, right = pair
    return left in spelled or right in spelled or left + right in spelled
