"""One generation while it runs: engine deltas in, text events out.

Owns: which choice is where, the end of each choice, waiting with a deadline, the counts.
Must not know: HTTP, dialects, sockets.
Invariant: every choice gives exactly one ChoiceEnd, or `events` raises; when it is left, for whatever reason,
the engine has been told to stop.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import gevent
import gevent.queue

from container.engine.request import ErrorCode, FinishReason
from container.ranks.messages import Delta, Token
from container.ranks.submission import DeltaTimeout, EngineError
from container.text.stream import Piece, StreamModel, TextStream
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft, Counts
from sagemaker_entry.generation import (
    Choice,
    ChoiceEnd,
    EndReason,
    Event,
    GenerationRequest,
    GenerationResult,
    PromptInfo,
    TextDelta,
    TokenPiece,
)
from sagemaker_entry.lifetime import End, Lifetime
from sagemaker_entry.metrics import Metrics

DOWN_RETRY_S: Final = 5
_ERRORS: Final = {
    ErrorCode.QUEUE_FULL: Code.OVERLOADED,
    ErrorCode.DRAINING: Code.DRAINING,
    ErrorCode.KV_EXHAUSTED: Code.KV_EXHAUSTED,
    ErrorCode.NUMERICAL: Code.NUMERICAL,
    ErrorCode.GRAMMAR: Code.GRAMMAR_FAILED,
}


class Submitted(Protocol):
    """What of a Submission is used here."""

    def next(self, wait_s: float | None = None) -> list[Delta]: ...

    def cancel(self, choice: int | None = None) -> None: ...


class AnswerModel(StreamModel, Protocol):
    """What of TextModel turns ids into text."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


@dataclass(slots=True)
class _ChoiceState:
    stream: TextStream
    tokens: int = 0
    last_token: int = -1
    logprob_sum: float = 0.0
    last_token_s: float | None = None
    ended: bool = False
    answer: list[str] = field(default_factory=list, repr=False)  # kept only to be judged


@dataclass(slots=True)
class _PromptState:
    ids: array[int] = field(repr=False)
    submission: Submitted
    choices: list[_ChoiceState]
    told: bool = False  # PromptInfo is out

    @property
    def ended(self) -> bool:
        return all(choice.ended for choice in self.choices)


class Run:
    """One accepted request. Iterate `events` once, or take `result`; then `close`."""

    def __init__(
        self,
        request: GenerationRequest,
        seed: int,
        model: AnswerModel,
        prompts: Sequence[tuple[array[int], Submitted]],
        lifetime: Lifetime,
        deadline_s: float,
        counts: Counts,
        metrics: Metrics,
        judge: Callable[[str], None] | None = None,
    ) -> None:
        """`judge` is given every finished answer that did not end by length; it raises ApiError."""
        self._request = request
        self._judge = judge
        self._seed = seed
        self._model = model
        self._lifetime = lifetime
        self._deadline_s = deadline_s
        self._counts = counts
        self._metrics = metrics
        self._started_s = time.monotonic()
        self._pumps: list[gevent.Greenlet] = []
        self._prompts = [
            _PromptState(ids, submission, [_ChoiceState(self._stream(ids)) for _ in range(request.best_of)])
            for ids, submission in prompts
        ]
        lifetime.on_end(self._cancel)

    def close(self) -> None:
        """Stop whatever still runs; idempotent."""
        self._lifetime.on_end(None)
        self._cancel()
        gevent.killall(self._pumps, block=False)
        self._pumps.clear()

    def events(self) -> Iterator[Event]:
        """Yield what happens, in order; raises ApiError or ClientLeft."""
        for index, deltas in self._batches():
            state = self._prompts[index]
            for delta in deltas:
                yield from self._apply(index, state, delta)
            if all(each.ended for each in self._prompts):
                return

    def result(self) -> GenerationResult:
        """Run to the end and return the whole answer; raises as `events` does."""
        infos: list[PromptInfo] = []
        texts: dict[tuple[int, int], list[TextDelta]] = {}
        ends: dict[tuple[int, int], ChoiceEnd] = {}
        for event in self.events():
            if isinstance(event, PromptInfo):
                infos.append(event)
            elif isinstance(event, TextDelta):
                texts.setdefault((event.prompt, event.choice), []).append(event)
            else:
                ends[event.prompt, event.choice] = event
        chosen: list[Choice] = []
        rest: list[Choice] = []
        for prompt in range(len(self._prompts)):
            ranked = self._ranked(prompt)
            for place, index in enumerate(ranked):
                whole = _choice(ends[prompt, index], texts.get((prompt, index), []), place)
                (chosen if place < self._request.choices else rest).append(whole)
        infos.sort(key=lambda info: info.prompt)
        return GenerationResult(tuple(infos), tuple(chosen), tuple(rest))

    def _ranked(self, prompt: int) -> list[int]:
        """Return the choices of a prompt, best mean logprob first where only some are wanted."""
        choices = self._prompts[prompt].choices
        order = list(range(len(choices)))
        if self._request.best_of > self._request.choices:
            order.sort(key=lambda i: -choices[i].logprob_sum / max(1, choices[i].tokens))
        return order

    def _stream(self, ids: array[int]) -> TextStream:
        request = self._request
        return TextStream(
            self._model,
            ids,
            request.stop,
            include_stop=request.include_stop,
            skip_special_tokens=request.skip_special_tokens,
            min_tokens=request.min_tokens,
        )

    def _cancel(self) -> None:
        for state in self._prompts:
            state.submission.cancel()

    # Waiting

    def _batches(self) -> Iterator[tuple[int, list[Delta]]]:
        """Yield (prompt index, deltas) as they arrive from any of the submissions."""
        if len(self._prompts) == 1:
            while True:
                yield 0, self._next(self._prompts[0].submission)
        arrived: gevent.queue.SimpleQueue = gevent.queue.SimpleQueue()
        self._pumps = [gevent.spawn(self._pump, i, state, arrived) for i, state in enumerate(self._prompts)]
        while True:
            index, outcome = arrived.get()  # every pump ends by the deadline, and says so
            if not isinstance(outcome, Exception):
                yield index, outcome
            elif not self._prompts[index].ended:  # else the pump had run ahead, past the prompt's end
                raise outcome

    def _pump(self, index: int, state: _PromptState, arrived: Any) -> None:
        try:
            while not state.ended:
                arrived.put((index, self._next(state.submission)))
                gevent.sleep(0)  # the consumer marks ended choices
        except Exception as error:  # noqa: BLE001  raised again by the consumer, which would else wait for ever
            arrived.put((index, error))

    def _next(self, submission: Submitted) -> list[Delta]:
        try:
            deltas = submission.next(max(0.0, self._deadline_s - time.monotonic()))
        except DeltaTimeout:
            raise ApiError(Code.DEADLINE) from None
        except EngineError:
            raise ApiError(Code.ENGINE_DOWN, retry_after_s=DOWN_RETRY_S) from None
        if deltas:
            return deltas
        if self._lifetime.reason is End.CLIENT_LEFT:
            raise ClientLeft
        if self._lifetime.reason is End.DRAINING:
            raise ApiError(Code.DRAINING, retry_after_s=DOWN_RETRY_S)
        raise ApiError(Code.ENGINE_DOWN, retry_after_s=DOWN_RETRY_S)

    # Deltas

    def _apply(self, index: int, state: _PromptState, delta: Delta) -> Iterator[Event]:
        choice = state.choices[delta.choice]
        if choice.ended:
            return  # the engine did not know yet that a stop string had matched
        if delta.error is not None:
            raise engine_error(delta)
        if not state.told:
            state.told = True
            yield self._prompt_info(index, state, delta)
        pieces: list[Piece] = []
        now = time.monotonic()
        # Several tokens of one step came in the time of one; each took its share of it.
        gap_s = (
            None if choice.last_token_s is None else (now - choice.last_token_s) / max(1, len(delta.tokens))
        )
        choice.last_token_s = now if delta.tokens else choice.last_token_s
        for token in delta.tokens:
            self._count_token(choice, token, gap_s)
            pieces += choice.stream.push(token.token, token)
            if choice.stream.stopped is not None:
                break
        if delta.finish is not None and choice.stream.stopped is None:
            pieces += choice.stream.finish()
        if pieces:
            text = "".join(piece.text for piece in pieces)
            yield TextDelta(index, delta.choice, text, tuple(self._piece(piece) for piece in pieces))
            if self._judge is not None:
                choice.answer += (piece.text for piece in pieces if not piece.special)
        reason = self._end(choice, delta.finish)
        if reason is not None:
            if self._judge is not None and reason is not EndReason.LENGTH:
                self._judge("".join(choice.answer))
            choice.ended = True
            if delta.finish is None:
                state.submission.cancel(delta.choice)  # a stop string: the engine would go on
            self._metrics.add("finished length" if reason is EndReason.LENGTH else "finished stop")
            self._metrics.observe("vllm:request_generation_tokens", choice.tokens)
            yield ChoiceEnd(index, delta.choice, reason, choice.tokens, self._seed)

    def _end(self, choice: _ChoiceState, finish: str | None) -> EndReason | None:
        if choice.stream.stopped is not None:
            return EndReason.STOP_STRING
        if finish is None:
            return None
        if finish == FinishReason.LENGTH:
            return EndReason.LENGTH
        if finish == FinishReason.GRAMMAR:
            return EndReason.EOS  # complete: to the client the model has ended its answer
        if finish == FinishReason.STOP_TOKEN:
            own = choice.last_token in self._model.eos_token_ids and not self._request.ignore_eos
            return EndReason.EOS if own else EndReason.STOP_TOKEN
        raise ApiError(Code.ENGINE_DOWN, retry_after_s=DOWN_RETRY_S)  # cancelled, but not by us

    def _count_token(self, choice: _ChoiceState, token: Token, gap_s: float | None) -> None:
        """Count a token that came `gap_s` after the one before it; None: the first."""
        if self._counts.first_token_s is None:
            now = time.monotonic()
            self._counts.first_token_s = now - self._started_s
            self._metrics.observe("vllm:time_to_first_token_seconds", now - self._started_s)
        if gap_s is not None:
            self._metrics.observe("vllm:inter_token_latency_seconds", gap_s)
        choice.tokens += 1
        choice.last_token = token.token
        choice.logprob_sum += token.logprob or 0.0
        self._counts.completion_tokens += 1
        self._metrics.add("vllm:generation_tokens_total")

    def _prompt_info(self, index: int, state: _PromptState, delta: Delta) -> PromptInfo:
        cached = delta.cached_tokens or 0
        self._counts.cached_tokens += cached
        self._metrics.add("vllm:prompt_tokens_total", len(state.ids))
        self._metrics.add("vllm:prompt_tokens_cached_total", cached)
        self._metrics.observe("vllm:request_prompt_tokens", len(state.ids))
        pieces: tuple[TokenPiece, ...] = ()
        if self._request.prompt_pieces:
            known: list[Token | None] = [None] * len(state.ids)
            known[1:] = delta.prompt_logprobs or known[1:]
            pieces = tuple(
                self._token_piece(token, self._model.token_text(token), self._model.is_special(token), tag)
                for token, tag in zip(state.ids, known, strict=True)
            )
        return PromptInfo(index, len(state.ids), cached, pieces)

    def _piece(self, piece: Piece) -> TokenPiece:
        tag = piece.tag if isinstance(piece.tag, Token) else None
        return self._token_piece(piece.token, piece.text, piece.special, tag)

    def _token_piece(self, token: int, text: str, special: bool, tag: Token | None) -> TokenPiece:
        if tag is None or tag.logprob is None:
            return TokenPiece(token, text, special)
        top = tuple((other, self._model.token_text(other), logprob) for other, logprob in tag.top)
        return TokenPiece(token, text, special, tag.logprob, top, self._model.token_bytes(token))


def engine_error(delta: Delta) -> ApiError:
    """Return the client's error for a delta that carries one."""
    code = ErrorCode(delta.error) if delta.error in set(ErrorCode) else ErrorCode.INTERNAL
    if code is ErrorCode.UNSUPPORTED:
        return ApiError(Code.UNSUPPORTED_FIELD, param="prompt logprobs")
    return ApiError(_ERRORS.get(code, Code.INTERNAL), retry_after_s=delta.retry_after_s)


def _choice(end: ChoiceEnd, deltas: Sequence[TextDelta], place: int) -> Choice:
    return Choice(
        prompt=end.prompt,
        choice=place,
        text="".join(delta.text for delta in deltas),
        pieces=tuple(piece for delta in deltas for piece in delta.pieces),
        reason=end.reason,
        completion_tokens=end.completion_tokens,
        seed=end.seed,
    )
