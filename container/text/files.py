"""The vendor's text files: read, bounded and checked, before anything native sees them.

Owns: file names, limits, the shape of tokenizer.json and its companions.
Must not know: the tokenizers library, what ids mean, where the bytes came from.
Invariant: a `TextFiles` is within every limit below and asks for no code of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from container.text.errors import TextCode, TextError

MAX_TOKENIZER_BYTES: Final = 32 * 1024 * 1024  # the largest published ones are just under
MAX_COMPANION_BYTES: Final = 8 * 1024 * 1024  # tokenizer_config.json repeats every added token
MAX_TEMPLATE_BYTES: Final = 1024 * 1024
MAX_ADDED_TOKENS: Final = 200_000
MAX_CONTENT_CHARS: Final = 512  # of one added token
MAX_STEPS: Final = 64  # normalizers, pre-tokenizers and decoders together
MAX_DEPTH: Final = 16
PIPELINE: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MODELS: Final = frozenset({"BPE", "Unigram", "WordPiece", "WordLevel"})

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The parsed files. `templates` maps a name (`default`, `tool_use`) to its source; empty: none."""

    tokenizer: Document = field(repr=False)
    config: Document = field(repr=False)  # tokenizer_config.json
    named: dict[str, str] = field(repr=False)  # `bos_token` and its kind: content
    extra_special: tuple[str, ...] = field(repr=False)  # special by declaration, without a name
    templates: dict[str, str] = field(repr=False)
    end_ids: tuple[int, ...]  # end-of-sequence ids of generation_config.json, else of config.json

    @classmethod
    def parse(cls, files: Mapping[str, bytes]) -> TextFiles:
        """Raises TextError (file missing, too large, malformed, remote code)."""
        tokenizer = _read(files, "tokenizer.json", MAX_TOKENIZER_BYTES)
        if tokenizer is None:
            raise TextError(TextCode.FILE_MISSING)
        _check_tokenizer(tokenizer)
        config = _read(files, "tokenizer_config.json", MAX_COMPANION_BYTES) or {}
        companions = {
            name: _read(files, name, MAX_COMPANION_BYTES) or {}
            for name in ("special_tokens_map.json", "generation_config.json", "config.json")
        }
        if any("auto_map" in document for document in (config, companions["config.json"])):
            raise TextError(TextCode.REMOTE_CODE)
        named, extra = _declared_tokens(companions["special_tokens_map.json"], config)
        return cls(
            tokenizer=tokenizer,
            config=config,
            named=named,
            extra_special=extra,
            templates=_templates(files, config),
            end_ids=_end_ids(companions["generation_config.json"]) or _end_ids(companions["config.json"]),
        )


def _malformed() -> TextError:
    return TextError(TextCode.FILE_MALFORMED)


def _read(files: Mapping[str, bytes], name: str, limit_bytes: int) -> Document | None:
    data = files.get(name)
    if data is None:
        return None
    if len(data) > limit_bytes:
        raise TextError(TextCode.FILE_TOO_LARGE)
    document = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(data)
    if not isinstance(document, dict):
        raise _malformed()
    return document


def _check_tokenizer(document: Document) -> None:
    model = document.get("model")
    if not isinstance(model, dict):
        raise _malformed()
    kind = model.setdefault("type", "BPE" if "merges" in model else None)
    vocabulary = model.get("vocab")
    if kind not in MODELS or not isinstance(vocabulary, list if kind == "Unigram" else dict):
        raise _malformed()
    added = document.setdefault("added_tokens", [])
    if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS:
        raise _malformed()
    for token in added:
        if not isinstance(token, dict) or type(token.get("id")) is not int:
            raise _malformed()
        content = token.get("content")
        if not isinstance(content, str) or not 0 < len(content) <= MAX_CONTENT_CHARS:
            raise _malformed()
    depths = (depth for key in PIPELINE for depth in _step_depths(document.get(key), 1))
    for steps, depth in enumerate(depths, start=1):
        if steps > MAX_STEPS or depth > MAX_DEPTH:
            raise _malformed()


def _step_depths(node: object, depth: int) -> Iterator[int]:
    """Yield the depth of every pipeline step at or below `node`, one level past the limit at most."""
    if isinstance(node, dict):
        if "type" in node:
            yield depth
        children = list(node.values())
    elif isinstance(node, list):
        children = node
    else:
        return
    if depth <= MAX_DEPTH * 2:  # a step sits in a list in a step: two levels each
        for child in children:
            yield from _step_depths(child, depth + 1)


def _content(value: object) -> str | None:
    """Return the text of a token given as text or as an added token's fields."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _declared_tokens(*documents: Document) -> tuple[dict[str, str], tuple[str, ...]]:
    named: dict[str, str] = {}
    extra: list[str] = []
    for document in documents:
        for key, value in document.items():
            content = _content(value)
            if key.endswith("_token") and content is not None:
                named[key] = content
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = document.get(key) or ()
            if isinstance(values, dict):
                named.update((name, text) for name, value in values.items() if (text := _content(value)))
            else:
                extra += [text for value in values if (text := _content(value))]
    return named, tuple(extra)


def _templates(files: Mapping[str, bytes], config: Document) -> dict[str, str]:
    """Return the templates by name; a file of its own wins over the configuration, as in transformers."""
    data = files.get("chat_template.jinja")
    source: object = config.get("chat_template")
    if data is not None:
        if len(data) > MAX_TEMPLATE_BYTES:
            raise TextError(TextCode.FILE_TOO_LARGE)
        source = data.decode("utf-8", "replace")
        if "\ufffd" in source:
            raise _malformed()
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": source}
    templates: dict[str, str] = {}
    for entry in source if isinstance(source, list) else [None]:
        if not isinstance(entry, dict):
            raise _malformed()
        name, text = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise _malformed()
        templates[name] = text
    if "default" not in templates:
        raise _malformed()
    return templates


def _end_ids(document: Document) -> tuple[int, ...]:
    value = document.get("eos_token_id")
    nested = document.get("text_config")
    if value is None and isinstance(nested, dict):
        value = nested.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise _malformed()
    return tuple(ids)
