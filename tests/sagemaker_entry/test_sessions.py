"""Stateful sessions: the table, and the platform's contract through the whole front."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagemaker_entry import sessions
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.sessions import Sessions
from tests.sagemaker_entry.harness import Server

# of `NewSessionResponseHeader` and `SessionIdHeader` in the runtime's service model
SHOWN = re.compile(
    r"[a-zA-Z0-9](-*[a-zA-Z0-9])*;\sExpires=[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
)
SESSION = "X-Amzn-SageMaker-Session-Id"
PROMPT = {"prompt": "ab", "max_tokens": 2}


class Clock:
    now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


def code_of(call: object, *arguments: str) -> Code:
    assert callable(call)
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value.code


def test_a_session_is_open_for_every_worker_until_one_closes_it() -> None:
    page = sessions.create()
    one, two = Sessions(page, 1, 8, 60), Sessions(page, 2, 8, 60)
    session, shown = one.open()
    assert SHOWN.fullmatch(shown) and shown.startswith(session)
    two.check(session)
    two.close(session)
    assert code_of(one.check, session) is Code.SESSION_NOT_FOUND
    assert code_of(one.close, session) is Code.SESSION_NOT_CLOSED


def test_a_session_expires_when_it_says() -> None:
    clock = Clock()
    table = Sessions(sessions.create(), 1, 8, 60, clock)
    session, shown = table.open()
    assert shown.endswith("Expires=2023-11-14T22:14:20Z")
    clock.now_s += 59.9
    table.check(session)
    clock.now_s += 0.1
    assert code_of(table.check, session) is Code.SESSION_NOT_FOUND


def test_open_sessions_are_bounded_over_all_workers_and_expired_ones_do_not_count() -> None:
    clock = Clock()
    page = sessions.create()
    one, two = Sessions(page, 1, 4, 60, clock), Sessions(page, 2, 4, 60, clock)
    opened = [table.open()[0] for table in (one, two, one, two)]
    assert code_of(one.open) is code_of(two.open) is Code.SESSIONS_FULL
    one.close(opened[3])
    two.open()
    clock.now_s += 61
    one.open()


def test_a_slot_that_just_expired_is_not_used_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SLOTS", 1)
    clock = Clock()
    table = Sessions(sessions.create(), 1, 1, 60, clock)
    table.open()
    clock.now_s += 60 + sessions.REST_S
    assert code_of(table.open) is Code.SESSIONS_FULL
    clock.now_s += 0.1
    table.open()


@pytest.mark.parametrize(
    "session",
    ["", "NEW_SESSION", "ff0000-" + "0" * 32, "01ffff-" + "0" * 32, "010000-" + "0" * 32, "x" * 256, "é"],
)
def test_an_id_nobody_gave_out_is_unknown(session: str) -> None:
    assert code_of(Sessions(sessions.create(), 1, 8, 60).check, session) is Code.SESSION_NOT_FOUND


def test_an_id_made_up_for_an_open_slot_is_unknown_and_closes_nothing() -> None:
    table = Sessions(sessions.create(), 1, 8, 60)
    session, _ = table.open()
    made_up = session[:7] + "0" * 32
    assert code_of(table.check, made_up) is Code.SESSION_NOT_FOUND
    assert code_of(table.close, made_up) is Code.SESSION_NOT_CLOSED
    table.check(session)


def test_the_table_holds_digests_and_times_alone() -> None:
    page = sessions.create()
    session, _ = Sessions(page, 1, 8, 60).open()
    assert session.encode() not in page[:] and bytes.fromhex(session[-32:]) not in page[:]


# Through the front, with two workers


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("stateful")
    with Server(
        directory, SAGEMAKER_ENABLE_STATEFUL_SESSIONS="true", STRONGROOM_MAX_SESSIONS="20"
    ) as running:
        yield running


def created(server: Server, **headers: str) -> str:
    status, got, body = server.request("POST", "/invocations", {"requestType": "NEW_SESSION"}, headers)
    assert status == 200 and got[SESSION] == got["X-Amzn-SageMaker-New-Session-Id"]
    assert SHOWN.fullmatch(got[SESSION])
    session = got[SESSION].split(";")[0]
    assert body.decode() == f"Session {session} created"
    return session


def closed(server: Server, session: str) -> tuple[int, str, str | None]:
    status, got, body = server.request("POST", "/invocations", {"requestType": "CLOSE"}, {SESSION: session})
    return status, body.decode(), got["X-Amzn-SageMaker-Closed-Session-Id"]


def message(server: Server, body: object, **headers: str) -> tuple[int, str]:
    status, reply = server.invoke(body, **headers)
    return status, reply["error"]["message"]


def test_a_session_is_made_used_and_closed(stateful: Server) -> None:
    session = created(stateful, **{SESSION: "NEW_SESSION"})
    for _ in range(6):  # whichever worker answers
        assert stateful.invoke(PROMPT, **{SESSION: session})[0] == 200
    assert closed(stateful, session) == (200, f"Session {session} closed", session)
    status, text = message(stateful, PROMPT, **{SESSION: session})
    assert status == 400 and text.startswith("Bad request: session not found: ")
    status, body, header = closed(stateful, session)
    assert status == 400 and header is None
    assert json.loads(body)["error"]["message"].startswith("Failed to close session: ")


def test_a_stream_can_use_a_session(stateful: Server) -> None:
    session = created(stateful)
    status, _, body = stateful.request("POST", "/invocations", {**PROMPT, "stream": True}, {SESSION: session})
    assert status == 200 and body.endswith(b"data: [DONE]\n\n")
    status, _, _ = stateful.request(
        "POST", "/invocations", {**PROMPT, "stream": True}, {SESSION: "NEW_SESSION"}
    )
    assert status == 400
    assert closed(stateful, session)[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"requestType": "NEW_SESSION", "prompt": "x"}, "no other field"),
        ({"requestType": "OPEN"}, "NEW_SESSION, CLOSE"),
        ({"requestType": 3}, "NEW_SESSION, CLOSE"),
    ],
)
def test_a_malformed_control_body_is_a_400(stateful: Server, body: object, said: str) -> None:
    status, text = message(stateful, body)
    assert status == 400 and said in text


def test_a_prompt_that_speaks_of_the_control_field_is_a_prompt(stateful: Server) -> None:
    assert stateful.invoke({"prompt": '{"requestType": "CLOSE"}', "max_tokens": 1})[0] == 200


def test_no_more_sessions_than_allowed_are_open(stateful: Server) -> None:
    opened = [created(stateful) for _ in range(20)]
    status, text = message(stateful, {"requestType": "NEW_SESSION"})
    assert status == 429 and "sessions" in text
    for session in opened:
        assert closed(stateful, session)[0] == 200
    assert closed(stateful, created(stateful))[0] == 200


def test_without_the_setting_control_and_header_are_refused(server: Server) -> None:
    status, text = message(server, {"requestType": "NEW_SESSION"})
    assert (status, text) == (400, "Invalid payload. stateful sessions not enabled")
    status, text = message(server, PROMPT, **{SESSION: "abc"})
    assert status == 400 and text.endswith("X-Amzn-SageMaker-Session-Id header not supported")


def test_a_short_life_ends(tmp_path: Path) -> None:
    with Server(tmp_path, STRONGROOM_SESSIONS="on", SAGEMAKER_SESSIONS_EXPIRATION="1") as running:
        session = created(running)
        assert running.invoke(PROMPT, **{SESSION: session})[0] == 200
        time.sleep(1.1)
        assert message(running, PROMPT, **{SESSION: session})[0] == 400
