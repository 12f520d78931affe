"""Cohere's v1 generate body to a generation request, and its answers.

Owns: fields and replies of generate. Must not know: chat.
Invariant: a stream has one `text-generation` per piece of text and one `stream-end` with the whole answer.

`stop_sequences` stay in the text and `end_sequences` do not; a body may have one of the two.
"""

from __future__ import annotations

from typing import Any

from sagemaker_entry.dialects.bounds import check_prompt_bytes, utf8_bytes
from sagemaker_entry.dialects.cohere_fields import (
    read_frames,
    read_max_tokens,
    read_sampling,
    read_seed,
    read_stops,
    refuse_unless,
)
from sagemaker_entry.dialects.cohere_frames import FINISH, Frames, meta, stream_error_event
from sagemaker_entry.dialects.fields import Fields, invalid_value, missing
from sagemaker_entry.dialects.openai_fields import served_model
from sagemaker_entry.dialects.openai_reply import Usage, bounded_logprob
from sagemaker_entry.dialects.presenter import JSON_TYPE, Parsed, ParseOptions, encode
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    Event,
    GenerationRequest,
    GenerationResult,
    ModelLimits,
    ReplyContext,
    TextDelta,
    TextPrompt,
    TokenPiece,
)


def parse(body: dict[str, Any], options: ParseOptions) -> Parsed:
    """Return the request in `body`; raises ApiError."""
    fields = Fields(body, options.unknown_fields)
    limits = options.limits
    fields.refuse(("preset",))
    fields.boolean("raw_prompting")  # a prompt is never put into a template here, whatever it says
    prompt = fields.text("prompt")
    if prompt is None:
        raise missing("prompt")
    if not prompt:
        raise invalid_value("prompt", "not empty")
    check_prompt_bytes(utf8_bytes(prompt), limits)
    likelihoods = fields.choice("return_likelihoods", ("NONE", "GENERATION")) == "GENERATION"
    max_tokens = read_max_tokens(fields, limits)
    frames = read_frames(fields, options)
    stop, include_stop = _stops(fields, limits)
    choices = fields.integer("num_generations", low=1, high=limits.max_choices) or 1
    refuse_unless(fields, "return_prompt", (False,))
    request = GenerationRequest(
        prompts=(TextPrompt(prompt),),
        sampling=read_sampling(fields, limits, top_logprobs=0 if likelihoods else None),
        seed=read_seed(fields),
        model=served_model(fields, limits),
        max_tokens=max_tokens,
        choices=choices,
        best_of=choices,
        stop=stop,
        include_stop=include_stop,
        truncate_tokens=_truncate(fields, limits, max_tokens),
        stream=frames is not None,
    )
    fields.finish()
    return Parsed(request, GeneratePresenter(prompt, frames or Frames.BARE, likelihoods=likelihoods))


def _stops(fields: Fields, limits: ModelLimits) -> tuple[tuple[str, ...], bool]:
    """Return the strings that end the answer, and whether they stay in it."""
    kept, cut = read_stops(fields, "stop_sequences", limits), read_stops(fields, "end_sequences", limits)
    if kept and cut:
        rule = "`end_sequences` cannot be combined with `stop_sequences`"
        raise ApiError(Code.INVALID_REQUEST, param="end_sequences", rule=rule)
    return kept or cut, bool(kept)


def _truncate(fields: Fields, limits: ModelLimits, max_tokens: int | None) -> int | None:
    """Return how many of the last prompt tokens to keep; Cohere's END, which keeps the first, is refused."""
    if fields.choice("truncate", ("NONE", "START")) != "START":
        return None
    return max(1, min(limits.input_tokens, limits.sequence_tokens - (max_tokens or 1)))


class GeneratePresenter:
    """Words one generate reply."""

    content_type = JSON_TYPE

    def __init__(self, prompt: str, frames: Frames, *, likelihoods: bool) -> None:
        self._prompt = prompt
        self._frames = frames
        self._likelihoods = likelihoods
        self._usage = Usage()
        self._id = ""
        self._texts: dict[int, list[str]] = {}
        self._pieces: dict[int, list[TokenPiece]] = {}
        self._ends: dict[int, ChoiceEnd] = {}

    @property
    def stream_type(self) -> str:
        return self._frames.content_type

    def complete(self, result: GenerationResult, context: ReplyContext) -> bytes:
        self._id, self._usage = context.id, Usage.of(result)
        return encode(self._reply([self._generation(i, each) for i, each in enumerate(result.choices)]))

    def open(self, context: ReplyContext) -> list[bytes]:
        self._id = context.id
        return []

    def event(self, event: Event) -> list[bytes]:
        self._usage.see(event)
        if isinstance(event, ChoiceEnd):
            self._ends[event.choice] = event
        if not isinstance(event, TextDelta):
            return []
        self._texts.setdefault(event.choice, []).append(event.text)
        self._pieces.setdefault(event.choice, []).extend(event.pieces)
        if not event.text:
            return []
        said = {"event_type": "text-generation", "text": event.text, "index": event.choice}
        return [self._frames.frame({**said, "is_finished": False})]

    def close(self) -> list[bytes]:
        generations = [
            {**self._generation(index, self._collected(end)), "finish_reason": FINISH[end.reason]}
            for index, end in sorted(self._ends.items())
        ]
        end: dict[str, Any] = {"event_type": "stream-end", "is_finished": True}
        end["finish_reason"] = generations[0]["finish_reason"]
        return [self._frames.frame({**end, "response": self._reply(generations)})]

    def stream_error(self, error: ApiError) -> bytes:
        return self._frames.frame(stream_error_event(error))

    def _collected(self, end: ChoiceEnd) -> Choice:
        text, pieces = "".join(self._texts.get(end.choice, ())), tuple(self._pieces.get(end.choice, ()))
        return Choice(0, end.choice, text, pieces, end.reason, end.completion_tokens, end.seed)

    def _generation(self, index: int, choice: Choice) -> dict[str, Any]:
        made: dict[str, Any] = {"id": f"{self._id}-{index}", "text": choice.text, "index": index}
        if self._likelihoods:
            each = [{"token": p.text, "likelihood": bounded_logprob(p.logprob)} for p in choice.pieces]
            made["token_likelihoods"] = each
            total = sum(bounded_logprob(piece.logprob) for piece in choice.pieces)
            made["likelihood"] = total / max(1, len(each))
        return made

    def _reply(self, generations: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "prompt": self._prompt,
            "generations": generations,
            "meta": meta(self._usage, "1", ()),
        }
