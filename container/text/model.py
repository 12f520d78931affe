"""A model's text side: strings to ids and back.

Owns: the two native tokenizers, the chat template, the rule that joins them.
Must not know: HTTP, the engine, tensors.
Invariant: text from outside never becomes a control id. Control ids in a prompt come from the model's own
    post-processor (BOS) or from characters its own template wrote, and from nowhere else.

A rendered conversation is cut at the control tokens the template wrote; what lies between is encoded, in one
native call, by a tokenizer that knows no control token:

    text   <|im_start|> user\\nhello <|im_end|> \\n
    ids    [1]          [...]       [2]        [198]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from container.text.detok import (
    ByteDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
    byte_rules,
)
from container.text.encoder import Encoder, TokenSpan
from container.text.errors import TextCode, TextError, fenced
from container.text.files import TextFiles
from container.text.segments import ControlMatcher
from container.text.template import ChatTemplate, Rendered
from container.text.tool_format import NO_TOOLS, ToolFormat, learn, with_short_ids
from container.text.vocabulary import Vocabulary


class TextModel:
    """Tokenizer and chat template of one model. Safe to call from many threads."""

    def __init__(self, files: TextFiles) -> None:
        """Raises TextError when the files contradict each other or the template cannot be served safely."""
        self._vocabulary = Vocabulary.build(files)
        self._full = fenced(TextCode.FILE_MALFORMED, Tokenizer.from_str, self._vocabulary.full)
        self._check_ids()
        self._encoder = Encoder(self._vocabulary)
        rules = byte_rules(files.tokenizer.get("decoder"))
        self._bytes = ByteTable(rules, self._vocabulary.pieces) if rules is not None else None
        self._matcher = ControlMatcher(self._vocabulary.controls)
        self._before, self._after = self._wrapping(files)
        self._template = ChatTemplate(files.templates, files.named) if files.templates else None
        if self._template is not None:
            self._check_template(self._template)
        self._tool_format = self._learn_tools()

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> TextModel:
        """Return the model described by `files`, name to content.

        Needs tokenizer.json; reads tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
        generation_config.json and config.json where given. Raises TextError.
        """
        return cls(TextFiles.parse(files))

    def _check_ids(self) -> None:
        """The library gives added tokens ids by a rule of its own: see that they are the file's."""
        ids = self._full.get_vocab()
        pieces = self._vocabulary.pieces
        if any(piece is not None and ids.get(piece) != token for token, piece in enumerate(pieces)):
            raise TextError(TextCode.FILE_MALFORMED)

    def _wrapping(self, files: TextFiles) -> tuple[list[int], list[int]]:
        """Return the ids that go before and after a raw text.

        As transformers: `add_bos_token` or `add_eos_token` in the configuration replace the post-processor.
        """
        flags = [files.config.get(name) for name in ("add_bos_token", "add_eos_token")]
        if flags != [None, None] or files.tokenizer.get("post_processor") is None:
            ids = [self._full.token_to_id(files.named.get(name, "")) for name in ("bos_token", "eos_token")]
            before, after = (
                [token] if flag and token is not None else [] for flag, token in zip(flags, ids, strict=True)
            )
            return before, after
        encode = self._full.encode
        bare = fenced(TextCode.FILE_MALFORMED, encode, "a", add_special_tokens=False).ids
        wrapped = fenced(TextCode.FILE_MALFORMED, encode, "a", add_special_tokens=True).ids
        for start in range(len(wrapped) - len(bare) + 1):
            if wrapped[start : start + len(bare)] == bare:
                return wrapped[:start], wrapped[start + len(bare) :]
        raise TextError(TextCode.FILE_MALFORMED)

    def _check_template(self, template: ChatTemplate) -> None:
        """Refuse a template whose control tokens lose their origin on the way: they would become text."""
        probe = template.probe
        every = self._matcher.cuts(probe.text, [(0, len(probe.text))])
        if self._matcher.cuts(probe.text, probe.trusted) != every:
            template.close()
            raise TextError(TextCode.TEMPLATE_UNSAFE)

    def _learn_tools(self) -> ToolFormat:
        template = self._template
        if template is None:
            return NO_TOOLS
        tokens = {control.content: control.id for control in self._vocabulary.controls}
        spoken = [control.id for control in self._vocabulary.controls if not control.special]

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str | None:
            try:
                return template.render(messages, tools).text
            except TextError:
                return None

        return learn(render, tokens.get, spoken)

    @property
    def tool_format(self) -> ToolFormat:
        """How this model calls tools, as its template writes it."""
        return self._tool_format

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text ever becomes, and that a client may not send."""
        return self._vocabulary.control_ids

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's and all of generation_config.json."""
        return self._vocabulary.eos_ids

    @property
    def bos_token_id(self) -> int | None:
        return self._vocabulary.bos_id

    @property
    def vocabulary(self) -> int:
        """Number of ids, holes included. The model's logits may be wider."""
        return len(self._vocabulary.pieces)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def is_special(self, token: int) -> bool:
        """True for tokens that `skip_special_tokens` hides."""
        return token in self._vocabulary.special_ids

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes `token` stands for inside a text; empty for ids without a piece."""
        if self._bytes is not None:
            return self._bytes.of(token)
        if self.is_special(token):
            return (self._vocabulary.pieces[token] or "").encode()
        return self._native_decode([token]).encode()

    def token_text(self, token: int) -> str:
        """Return `token` as text, U+FFFD for bytes that are no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` from its first character on; what a stream of them would show."""
        detokenizer = self.detokenizer((), skip_special_tokens=skip_special_tokens)
        shown = (token for token in ids if not (skip_special_tokens and self.is_special(token)))
        return "".join([*map(detokenizer.push, shown), detokenizer.flush()])

    def detokenizer(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """Return a detokenizer for what follows `prompt_ids`.

        It is not to be given special ids when `skip_special_tokens`; the flag says how the prompt reads.
        """
        skip = self._vocabulary.special_ids if skip_special_tokens else frozenset()
        if self._bytes is not None:
            return ByteDetokenizer(self._bytes, prompt_ids, skip)
        return WindowDetokenizer(self._native_decode, prompt_ids, skip)

    def _native_decode(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if 0 <= token < self.vocabulary]
        text: str = fenced(TextCode.TOKENIZER_FAILED, self._full.decode, known, skip_special_tokens=False)
        return text

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a raw prompt, with BOS and the like as the tokenizer itself adds them.

        Raises TextError (lone surrogate, tokenizer failed, control token).
        """
        return [*self._before, *self._encoder.ids(text), *self._after]

    def tokenize(self, text: str) -> list[TokenSpan]:
        """Return what encode_text does, with the characters each token stands for. Raises the same."""
        before = [TokenSpan(token, "", 0, 0) for token in self._before]
        after = [TokenSpan(token, "", len(text), len(text)) for token in self._after]
        return before + self._encoder.spans(text) + after

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Return the conversation as the model's template writes it, and which parts the template wrote.

        Raises TextError (no template, and all of ChatTemplate.render).
        """
        if self._template is None:
            raise TextError(TextCode.NO_TEMPLATE)
        return self._template.render(
            with_short_ids(messages) if self._tool_format.short_ids else messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Return the ids of a rendered conversation; BOS only where the template wrote it.

        Raises as encode_text.
        """
        return self._encoder.ids(rendered.text, self._matcher.cuts(rendered.text, rendered.trusted))

    def tokenize_rendered(self, rendered: Rendered) -> list[TokenSpan]:
        """Return the same with the characters each token stands for."""
        return self._encoder.spans(rendered.text, self._matcher.cuts(rendered.text, rendered.trusted))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation: render_chat, then encode_rendered. Raises as both."""
        return self.encode_rendered(
            self.render_chat(messages, tools, add_generation_prompt, continue_final_message, template_kwargs)
        )

    def close(self) -> None:
        """End the template's child processes. Idempotent."""
        if self._template is not None:
            self._template.close()
