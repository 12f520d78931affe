"""The schema's round trip, the translation's bounds, and that no prompt shows in any repr or exception."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest

from container.engine.request import (
    EngineRequest,
    ErrorCode,
    FinishReason,
    Refused,
    RequestKey,
    SampledToken,
    SamplingParams,
    SequenceDelta,
)
from container.ranks.channel import FrameError
from container.ranks.config import EngineConfig, decode, encode
from container.ranks.messages import Add, Cancel, Deltas, decode_from_engine, decode_from_front, frame
from container.ranks.submission import Submission
from container.ranks.switchboard import Arrival, Cancellation
from container.ranks.translation import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKENS,
    to_delta,
    to_prompt_bytes,
    to_request,
    to_wire_sampling,
)
from tests.ranks.doubles import GREEDY, add

SECRET = 31337  # a token id that occurs nowhere else
SECRET_TEXT = "canary-c0ffee"


def sampling(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.random() * 2,
        top_k=rng.randrange(100),
        top_p=rng.random() or 1.0,
        min_p=rng.random(),
        typical_p=rng.random() or 1.0,
        repetition_penalty=rng.random() + 0.5,
        frequency_penalty=rng.uniform(-2, 2),
        presence_penalty=rng.uniform(-2, 2),
        logit_bias=tuple((rng.randrange(1000), rng.uniform(-5, 5)) for _ in range(rng.randrange(4))),
        seed=rng.getrandbits(64),
        top_logprobs=rng.choice((None, 0, 5)),
        prompt_logprobs=rng.choice((None, 0, 5)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_request_arrives_at_the_engine_as_it_was_sent(seed):
    rng = random.Random(seed)
    prompt = array("i", [rng.randrange(2**31) for _ in range(rng.randrange(1, 500))])
    params = sampling(rng)
    sent = Add(
        id=rng.randint(1, 2**63 - 1),
        prompt=to_prompt_bytes(prompt),
        max_tokens=rng.randint(1, 99),
        sampling=to_wire_sampling(params),
        choices=rng.randint(1, 16),
        min_tokens=1,
        stop_token_ids=[1, 2, 2],
        tenant="t",
        cache_salt="s",
    )
    request = to_request(decode_from_front(frame(sent)[4:]), 5)
    assert request == EngineRequest(
        key=RequestKey(5, sent.id),
        prompt=prompt,
        max_tokens=sent.max_tokens,
        sampling=params,
        choices=sent.choices,
        min_tokens=1,
        stop_token_ids=frozenset({1, 2}),
        tenant="t",
        cache_salt="s",
    )


def test_a_delta_arrives_at_the_front_as_the_engine_made_it():
    made = SequenceDelta(
        RequestKey(1, 9),
        2,
        (SampledToken(4, -0.5, ((4, -0.5), (7, -1.5))), SampledToken(5)),
        finish=FinishReason.STOP_TOKEN,
        cached_tokens=16,
        prompt_logprobs=(SampledToken(3, -0.25),),
    )
    (delta,) = decode_from_engine(frame(Deltas(1, [to_delta(made)]))[4:]).deltas
    assert (delta.id, delta.choice, delta.finish, delta.error) == (9, 2, "stop_token", None)
    assert [(t.token, t.logprob, t.top) for t in delta.tokens] == [
        (4, -0.5, [(4, -0.5), (7, -1.5)]),
        (5, None, []),
    ]
    assert delta.cached_tokens == 16
    assert delta.prompt_logprobs is not None
    assert [t.token for t in delta.prompt_logprobs] == [3]


@pytest.mark.parametrize("error", list(ErrorCode))
def test_every_error_code_travels(error):
    made = SequenceDelta(RequestKey(1, 9), 0, error=error)
    assert to_delta(made).error == error.value


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": b"\x00\x00\x00"},
        {"stop_token_ids": [0] * (MAX_STOP_TOKENS + 1)},
        {"tenant": "x" * 257},
        {"cache_salt": "x" * 257},
        {"sampling": to_wire_sampling(SamplingParams(logit_bias=((1, 1.0),) * (MAX_LOGIT_BIAS + 1)))},
        {
            "sampling": to_wire_sampling(SamplingParams(prompt_logprobs=20)),
            "prompt": b"\x01\x00\x00\x00" * 47_620,
        },
    ],
)
def test_a_request_beyond_a_bound_is_refused(changes):
    with pytest.raises(Refused) as refused:
        to_request(add(1, [1], **changes), 1)
    assert refused.value.code is ErrorCode.INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_token_ids": [0] * MAX_STOP_TOKENS},
        {"tenant": "x" * 256, "cache_salt": "x" * 256},
        {"sampling": to_wire_sampling(SamplingParams(logit_bias=((1, 1.0),) * MAX_LOGIT_BIAS))},
        {
            "sampling": to_wire_sampling(SamplingParams(prompt_logprobs=20)),
            "prompt": b"\x01\x00\x00\x00" * 47_619,
        },
    ],
)
def test_a_request_at_a_bound_passes(changes):
    assert to_request(add(1, [1], **changes), 1).key == RequestKey(1, 1)


def test_the_largest_prompt_logprobs_that_pass_fit_one_frame():
    top = tuple((99_999, -1.23456789) for _ in range(20))
    token = SampledToken(99_999, -1.23456789, top)
    made = SequenceDelta(RequestKey(1, 2**63 - 1), 0, (token,), prompt_logprobs=(token,) * 47_618)
    assert frame(Deltas(1, [to_delta(made)]))


def refused_text(act: Callable[[], object]) -> str:
    with pytest.raises((Refused, ValueError, FrameError)) as caught:
        act()
    return repr(caught.value) + str(caught.value)


def test_no_prompt_and_no_salt_shows_in_any_repr_or_exception():
    wire = add(1, [SECRET], tenant=SECRET_TEXT, cache_salt=SECRET_TEXT, stop_token_ids=[SECRET])
    request = to_request(wire, 1)
    token = SampledToken(SECRET, -0.5, ((SECRET, -0.5),))
    delta = to_delta(SequenceDelta(request.key, 0, (token,), prompt_logprobs=(token,)))
    submission = Submission(1, 1, lambda _: None)
    submission.deliver([delta])
    things = (
        *(wire, wire.sampling, request, request.sampling, Arrival(request, 10), Cancellation(request.key)),
        *(delta, delta.tokens, Deltas(1, [delta]), Cancel(1), submission, Refused(ErrorCode.INVALID)),
    )
    text = "".join(map(repr, things)) + "".join(map(str, things))
    text += refused_text(lambda: to_request(add(1, [1], cache_salt=SECRET_TEXT * 100), 1))
    text += refused_text(lambda: frame(add(1, [SECRET] * 5_000_000)))
    assert str(SECRET) not in text
    assert SECRET_TEXT not in text


def test_a_decoding_error_tells_the_rule_and_not_the_value():
    import msgspec

    payload = msgspec.msgpack.encode(["add", 1, SECRET_TEXT, 4, [SECRET_TEXT], 1, 0, [], "", ""])
    with pytest.raises(msgspec.DecodeError) as caught:
        decode_from_front(payload)
    assert SECRET_TEXT not in str(caught.value)


def test_sampling_defaults_survive_the_wire():
    assert to_request(add(1, [1]), 1).sampling == GREEDY


def test_the_configuration_survives_its_file_form_and_refuses_what_it_does_not_know():
    import msgspec

    config = EngineConfig(model_dir="m", threads=2, waiting_s=1.5)
    assert decode(encode(config)) == config
    for text in ('{"model_dir": "m", "more": 1}', '{"model_dir": 1}', "{}", "[]", ""):
        with pytest.raises(msgspec.DecodeError):
            decode(text)
