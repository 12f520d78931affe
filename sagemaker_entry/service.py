"""From a validated request to a run on the engine, and the facts about the model that validation needs.

Owns: order of admission: ready, room, tokenize, window, submit. One per worker.
Must not know: HTTP, dialects, sockets.
Invariant: a request that cannot run alone is refused before the engine hears of it; what a full engine would
refuse costs no tokenizing.
"""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from gevent.event import Event

from container.engine.request import Grammar, SamplingParams
from container.ranks.messages import Welcome
from container.ranks.submission import EngineBusy, EngineError
from container.text.tool_format import ToolFormat
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.exchange import ClientLeft, Exchange
from sagemaker_entry.generation import GenerationRequest, ModelLimits
from sagemaker_entry.grammars import Grammars
from sagemaker_entry.lifetime import End
from sagemaker_entry.metrics import Metrics
from sagemaker_entry.prompts import Tokenizing, output_tokens, token_ids
from sagemaker_entry.run import DOWN_RETRY_S, AnswerModel, Run, Submitted
from sagemaker_entry.settings import Settings

T = TypeVar("T")
# Raises ApiError when a grammar, from the field of that name, cannot be followed.
GrammarCheck = Callable[[Grammar, str], None]

WELCOME_WAIT_S = 1.0
BUSY_RETRY_S = 1
REFUSED_STATUS = 400  # the grammar itself is at fault; an overloaded check is no reason to follow another
TEXT_WAIT_S = 10.0  # a replaced worker loads its text model in about a second


class Engine(Protocol):
    """What of EngineClient is used here."""

    def welcome(self, wait_s: float = WELCOME_WAIT_S) -> Welcome: ...

    def submit(
        self,
        prompt: array[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        choices: int = 1,
        min_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
        tenant: str = "",
        cache_salt: str = "",
    ) -> Submitted: ...


class Model(Tokenizing, AnswerModel, Protocol):
    """What of TextModel is used here."""

    @property
    def tool_format(self) -> ToolFormat: ...


class Service:
    """Starts runs. `text` is given once it has loaded.

    `full_s` tells whether the engine has room, without asking it: 0, or the seconds to try again after.
    """

    def __init__(
        self, settings: Settings, engine: Engine, metrics: Metrics, full_s: Callable[[], int] = lambda: 0
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._full_s = full_s
        self._known: tuple[Welcome, ModelLimits] | None = None
        self.text: Model | None = None
        self._loaded = Event()
        self.grammars = Grammars(metrics)
        self.special_ids: frozenset[int] = frozenset()
        self.defaults = SamplingParams()

    def ready(self, text: Model, defaults: SamplingParams) -> None:
        """Take the loaded text model and the model's own sampling defaults."""
        self.special_ids = frozenset(token for token in text.control_ids if text.is_special(token))
        self.defaults = defaults
        self.text = text
        self._loaded.set()
        self._metrics.put("text_ready", 1)

    @property
    def model(self) -> Model:
        """The text model, waited for while this worker is new; raises ApiError LOADING."""
        self.await_text()
        if self.text is None:
            raise ApiError(Code.LOADING, retry_after_s=DOWN_RETRY_S)
        return self.text

    def await_text(self) -> None:
        """Wait while this worker is new; call from the event loop's own thread."""
        if self.text is None:
            self._loaded.wait(TEXT_WAIT_S)

    def limits(self) -> ModelLimits:
        """Return what requests are validated against; raises ApiError when the engine does not answer."""
        welcome = reach(self._engine.welcome)
        if self._known is None or self._known[0] is not welcome:
            self._known = (welcome, self._limits(welcome))
        return self._known[1]

    def tool_format(self) -> ToolFormat:
        """Return how the model calls tools; raises ApiError LOADING. Does not wait: any thread may ask."""
        if self.text is None:
            raise ApiError(Code.LOADING, retry_after_s=DOWN_RETRY_S)
        return self.text.tool_format

    def offers_grammars(self) -> bool | None:
        """Return whether the engine follows grammars, None while it does not answer."""
        try:
            return reach(self._engine.welcome).grammar
        except ApiError:
            return None

    def running_limit(self) -> int:
        """Return how many sequences the engine runs at once."""
        return reach(self._engine.welcome).running_limit

    def check_room(self) -> None:
        """Raise ApiError OVERLOADED while the engine would refuse a newcomer; it has the last word."""
        if full_s := self._full_s():
            raise ApiError(Code.OVERLOADED, retry_after_s=full_s)

    def start(self, request: GenerationRequest, exchange: Exchange) -> Run:
        """Tokenize and submit `request`; raises ApiError, or ClientLeft when nobody waits any more."""
        self.check_room()
        settings, model, limits = self._settings, self.model, self.limits()
        seconds = settings.stream_deadline_s if request.stream else settings.request_deadline_s
        served = reach(self._engine.welcome).grammar
        request = with_followed_grammar(
            request, lambda grammar, field: self.grammars.check(grammar, field, served=served)
        )
        grammar = request.sampling.grammar
        seed = request.seed if request.seed is not None else int.from_bytes(os.urandom(8), "little")
        prompts = [token_ids(model, prompt, request, limits) for prompt in request.prompts]
        budgets = [output_tokens(len(ids), request.max_tokens, limits) for ids in prompts]
        exchange.counts.prompt_tokens = sum(len(ids) for ids in prompts)
        if exchange.lifetime.reason is End.CLIENT_LEFT:
            raise ClientLeft
        submitted: list[tuple[array[int], Submitted]] = []
        try:
            for ids, budget in zip(prompts, budgets, strict=True):
                submitted.append((ids, self._submit(request, ids, budget, seed)))
            return Run(
                request,
                seed,
                model,
                submitted,
                exchange.lifetime,
                exchange.started_s + seconds,
                exchange.counts,
                self._metrics,
                None if grammar is None else self.grammars.judge(grammar),
            )
        except BaseException:
            for _, submission in submitted:
                submission.cancel()
            raise

    def _submit(self, request: GenerationRequest, ids: array[int], budget: int, seed: int) -> Submitted:
        own_stops = frozenset() if request.ignore_eos else self.model.eos_token_ids
        return reach(
            lambda: self._engine.submit(
                ids,
                max_tokens=budget,
                sampling=dataclasses.replace(request.sampling, seed=seed),
                choices=request.best_of,
                min_tokens=min(request.min_tokens, budget),
                stop_token_ids=own_stops.union(request.stop_token_ids),
                cache_salt=request.cache_salt,
            )
        )

    def _limits(self, welcome: Welcome) -> ModelLimits:
        settings = self._settings
        return ModelLimits(
            model=settings.name,
            sequence_tokens=welcome.sequence_tokens,
            input_tokens=min(
                settings.max_input_tokens or welcome.sequence_tokens, welcome.sequence_tokens - 1
            ),
            vocabulary=welcome.vocabulary,
            max_best_of=settings.max_best_of,
            max_tgi_stop_strings=settings.max_stop_sequences,
            max_top_tokens=settings.max_top_n_tokens,
            default_sampling=self.defaults,
            grammar=welcome.grammar,
        )


def with_followed_grammar(request: GenerationRequest, check: GrammarCheck) -> GenerationRequest:
    """Return `request` with the grammar that `check` passes, its own or its fallback; raises ApiError."""
    grammar, fallback = request.sampling.grammar, request.grammar_fallback
    if grammar is None:
        return request
    try:
        check(grammar, request.grammar_field)
    except ApiError as error:
        if fallback is None or error.status != REFUSED_STATUS:
            raise
    else:
        return request
    check(fallback, request.grammar_field)
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, grammar=fallback))


def reach(call: Callable[[], T]) -> T:
    """Return `call()` with the engine's absence as the client's error."""
    try:
        return call()
    except EngineBusy:
        raise ApiError(Code.OVERLOADED, retry_after_s=BUSY_RETRY_S) from None
    except EngineError:
        raise ApiError(Code.ENGINE_DOWN, retry_after_s=DOWN_RETRY_S) from None
