"""What every dialect means: one generation request and the events that answer it.

Owns: the neutral request (text or messages, not yet tokens), text deltas, endings, usage.
Must not know: HTTP, any dialect's field names, sockets, tensors.
Invariant: content fields never appear in a repr.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from container.engine.request import Grammar, SamplingParams


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Raw text, tokenized with the model's usual prefix (BOS where it has one)."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids as given; control ids are refused by the tokenizing step."""

    tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's own chat template.

    Each message is a mapping with `role` and plain-string `content` (None only beside `tool_calls`), plus
    `name`, `tool_calls`, `tool_call_id`, `reasoning_content` where given: validated shapes, untrusted text.
    `arguments` of a tool call is a mapping (templates print it as JSON), not the string a client sends.
    """

    messages: tuple[Mapping[str, Any], ...] = field(repr=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request, dialect removed.

    `sampling.seed` is ignored when `seed` is None: the service draws one. `max_tokens` None means up to the
    window. `best_of` is never below `choices`; above it, the `choices` best by mean logprob are returned
    (never while streaming), and `sampling.top_logprobs` is then at least 0, to have logprobs to rank by.
    `truncate_tokens` keeps only that many of the last prompt tokens (TGI). `prompt_pieces` asks for
    `PromptInfo.pieces`; their logprobs are there when `sampling.prompt_logprobs` is set too.
    """

    prompts: tuple[Prompt, ...] = field(repr=False)
    sampling: SamplingParams
    seed: int | None = None
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    choices: int = 1
    best_of: int = 1
    stop: tuple[str, ...] = field(default=(), repr=False)
    include_stop: bool = False  # keep the matched stop string in the text
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    truncate_tokens: int | None = None
    cache_salt: str = field(default="", repr=False)
    stream: bool = False
    prompt_pieces: bool = False
    grammar_field: str = "response_format"  # where `sampling.grammar` came from, for errors
    grammar_fallback: Grammar | None = None  # followed instead where that grammar cannot be

    def following(self, grammar: Grammar) -> GenerationRequest:
        """Return this request with its answers held to `grammar`."""
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, grammar=grammar))


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token with its share of the text; `text` may be empty inside a multi-byte character.

    `raw` holds the token's own bytes where the tokenizer knows them (they may be half a character).
    """

    id: int = field(repr=False)
    text: str = field(repr=False)
    special: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = field(default=(), repr=False)  # id, text, logprob
    raw: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of a tokenized text and the half-open range of characters it covers."""

    id: int = field(repr=False)
    text: str = field(repr=False)
    start: int
    stop: int


class EndReason(enum.StrEnum):
    """How a choice ended; dialects translate the value."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"  # a stop id of the request, not the model's own
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Known when the first delta of a prompt arrives."""

    prompt: int  # index of the prompt in the request
    prompt_tokens: int
    cached_tokens: int
    pieces: Sequence[TokenPiece] = field(
        default=(), repr=False
    )  # prompt tokens; logprob None unless asked for


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice, final: nothing in it is taken back later."""

    prompt: int
    choice: int
    text: str = field(repr=False)
    pieces: Sequence[TokenPiece] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The last event of one choice."""

    prompt: int
    choice: int
    reason: EndReason
    completion_tokens: int
    seed: int


Event = PromptInfo | TextDelta | ChoiceEnd


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished continuation."""

    prompt: int
    choice: int
    text: str = field(repr=False)
    pieces: tuple[TokenPiece, ...] = field(repr=False)
    reason: EndReason
    completion_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer: prompts in request order, choices in (prompt, choice) order.

    With `best_of`, `choices` holds the chosen ones first per prompt and `rest` the others (TGI lists them).
    """

    prompts: tuple[PromptInfo, ...]
    choices: tuple[Choice, ...]
    rest: tuple[Choice, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return sum(p.prompt_tokens for p in self.prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(p.cached_tokens for p in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(c.completion_tokens for c in (*self.choices, *self.rest))


@dataclass(frozen=True, slots=True)
class ReplyContext:
    """What a presenter needs beside the events."""

    id: str  # public id of the reply, made by the server
    created_s: int  # unix seconds
    model: str  # served name
    fingerprint: str = "strongroom"  # of model and configuration; some clients require the field
    special_token_ids: frozenset[int] = frozenset()  # to mark them among alternatives


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Bounds a dialect validates against; from settings and the engine's welcome."""

    model: str  # served name
    sequence_tokens: int
    input_tokens: int
    vocabulary: int
    max_choices: int = 16
    max_best_of: int = 2
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_tgi_stop_strings: int = 4
    max_top_tokens: int = 5  # TGI top_n_tokens
    max_top_logprobs: int = 20
    max_prompts: int = 64  # prompts in one completion request
    max_sequences: int = 128  # prompts x continuations one request may ask for
    max_stop_token_ids: int = 64
    prompt_bytes_per_token: int = 12  # text longer than this times the window is refused before tokenizing
    # Names that unmodified clients send when they were given only a URL (huggingface_hub: "dummy").
    model_aliases: tuple[str, ...] = ("dummy", "tgi")
    max_messages: int = 2048
    grammar: bool = False  # the engine can hold answers to a grammar
    default_sampling: SamplingParams = field(default_factory=SamplingParams)  # the model's generation_config
