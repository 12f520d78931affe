"""What templates may do and what they are given: bombs end in the child, only text comes back."""

from __future__ import annotations

import time
from typing import Any

import pytest

from container.text.errors import TextCode, TextError
from container.text.model import TextModel
from container.text.template import ChatTemplate
from container.text.worker import START_S
from tests.text import build
from tests.text.serve import GO, QUESTION, on_demand, served

# What the list of template attacks names; each must end in an error or in bounded, harmless text.
BOMBS = {
    "globals of a function": "{{ lipsum.__globals__ }}",
    "method resolution order": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__base__.__subclasses__() }}",
    "attribute filter": "{{ ''|attr('format') }}",
    "attribute filter on a class": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class in a format string": "{{ '{0.__class__}'.format(1) }}",
    "class in a traced format string": "{{ ('{0.__' ~ 'class__}').format(messages) }}",
    "class through format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "huge range": "{{ range(10**9)|list }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long string": "{{ 'a'*10**9 }}",
    "long list": "{{ [0]*10**8 }}",
    "power of powers": "{{ 10**10**7 }}",  # Jinja reads (10**10)**7
    "large power": "{% set n = 10**8 %}{{ 10**n }}",
    "large power printed": "{% set n = 10**5 %}{{ 10**n }}",
    "repeated doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "wide centre": "{{ 'a'|center(10**9) }}",
    "wide format": "{{ '%1000000000d'|format(1) }}",
    "deep recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "no such file": "{% include '/etc/passwd' %}",
    "underscore in a namespace": "{% set n = namespace(__class__=1) %}{{ n.__class__ }}",
    "changing the arguments": "{{ messages.append(1) }}",
    "an exception with text": "{{ raise_exception('secret ' + messages[0].content) }}",
}


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[float, str | TextCode]]:
    """Every bomb once, all in one template that answers a plain question before and after each."""
    branches = "".join(
        "{% elif messages[0].content == '" + name + "' %}" + bomb for name, bomb in BOMBS.items()
    )
    outcomes: dict[str, tuple[float, str | TextCode]] = {}
    with served("{% if messages[0].content == 'hi' %}fine" + branches + "{% endif %}") as template:
        for name in BOMBS:
            started = time.monotonic()
            try:
                outcome: str | TextCode = template.render([{"role": "user", "content": name}]).text
            except TextError as error:
                outcome = error.code
                assert str(error) == error.code.value
                assert error.__context__ is None
            outcomes[name] = (time.monotonic() - started, outcome)
            assert template.render(QUESTION).text == "fine"
    return outcomes


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_ends_within_its_limits(reports: dict[str, tuple[float, str | TextCode]], name: str) -> None:
    wall_s, outcome = reports[name]
    assert wall_s < 6
    if isinstance(outcome, TextCode):
        assert outcome in {TextCode.TEMPLATE_FAILED, TextCode.TEMPLATE_TIMEOUT}
    else:
        # Blocked attributes read as undefined; one power is small enough to print.
        assert outcome == ("1" + "0" * 70 if name == "power of powers" else "")


def test_what_runs_long_is_killed_by_time_and_what_is_large_by_memory(
    reports: dict[str, tuple[float, str | TextCode]],
) -> None:
    for name in ("nested loops", "large power"):
        assert reports[name][1] is TextCode.TEMPLATE_TIMEOUT
    for name in ("long string", "long list", "wide centre", "repeated doubling"):
        assert reports[name][1] is TextCode.TEMPLATE_FAILED
        assert reports[name][0] < 2


def test_a_long_but_bounded_text_is_served() -> None:
    with served(on_demand("{{ ['a'*10**6, 'b'*10**6]|join }}")) as template:
        assert len(template.render(GO).text) == 2 * 10**6


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("{{ 'a'*10**9 }}", TextCode.TEMPLATE_FAILED),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", None),
        ("{{ 10**(10**8) }}", None),  # folded while compiling
        ("{% if %}", TextCode.TEMPLATE_FAILED),
        ("{{ raise_exception('no') }}", TextCode.TEMPLATE_FAILED),
        ("{{ ''|attr('format') }}", TextCode.TEMPLATE_FAILED),
        ("{{ messages | unknown_filter }}", TextCode.TEMPLATE_FAILED),
    ],
)
def test_a_template_that_cannot_render_a_question_is_refused_at_load(
    source: str, code: TextCode | None
) -> None:
    started = time.monotonic()
    with pytest.raises(TextError) as caught:
        ChatTemplate({"default": source}, {})
    assert caught.value.code is (code or TextCode.TEMPLATE_TIMEOUT)
    assert time.monotonic() - started < START_S - 2, "ended by its CPU limit, before the wall clock does"


def test_a_template_that_wants_a_system_message_first_loads() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}ok"
    with served(source) as template:
        assert template.render([{"role": "system", "content": "x"}]).text == "ok"
        with pytest.raises(TextError):
            template.render(QUESTION)


def test_a_template_whose_control_tokens_lose_their_origin_is_refused() -> None:
    """`format` is not followed: served, its `<|im_start|>` would reach the model as letters."""
    files = build.packed(build.byte_level())
    source = "{{ '<|%s|>' | format('im_start') }}{{ messages[0].content }}"
    with pytest.raises(TextError) as caught:
        TextModel.load(build.with_template(files, source))
    assert caught.value.code is TextCode.TEMPLATE_UNSAFE


@pytest.mark.parametrize("place", ["content", "key", "tool", "argument", "role"])
def test_a_lone_surrogate_anywhere_is_refused(place: str) -> None:
    bad = "a\ud800b"
    message = {"role": "user", "content": "x"}
    tools: list[dict[str, Any]] = []
    arguments: dict[str, Any] = {}
    match place:
        case "key":
            message[bad] = "x"
        case "tool":
            tools = [{"function": {"parameters": {"enum": [bad]}}}]
        case "argument":
            arguments = {"mode": [bad]}
        case _:
            message[place] = bad
    with served("fine") as template:
        with pytest.raises(TextError) as caught:
            template.render([message], tools, template_kwargs=arguments)
        assert caught.value.code is TextCode.LONE_SURROGATE
        assert caught.value.__context__ is None


def test_what_json_cannot_say_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with served("fine") as template:
        for value in (float("nan"), float("inf"), object(), deep):
            with pytest.raises(TextError) as caught:
                template.render(QUESTION, template_kwargs={"mode": value})
            assert caught.value.code is TextCode.TEMPLATE_FAILED


def test_a_conversation_that_is_too_large_is_refused_before_it_is_sent() -> None:
    with served("fine") as template:
        before = template.pids
        with pytest.raises(TextError) as caught:
            template.render([{"role": "user", "content": "x" * (17 * 2**20)}])
        assert caught.value.code is TextCode.TOO_LARGE
        assert template.pids == before


def test_a_large_conversation_renders_whole() -> None:
    content = "é北😀 words " * 150_000
    with served("<<{{ messages[0].content }}>>") as template:
        rendered = template.render([{"role": "user", "content": content}])
        assert rendered.text == f"<<{content}>>"
        assert rendered.trusted == ((0, 2), (len(content) + 2, len(content) + 4))


def test_the_text_is_not_in_the_repr() -> None:
    with served("{{ messages[0].content }}") as template:
        assert "secret" not in repr(template.render([{"role": "user", "content": "secret"}]))


def test_continuing_needs_a_final_message_with_text() -> None:
    with served("{% for m in messages %}{{ m.role }}{% endfor %}") as template:
        for messages in ([], [{"role": "assistant", "content": None}], QUESTION):
            with pytest.raises(TextError) as caught:
                template.render(messages, continue_final_message=True)
            assert caught.value.code is TextCode.TEMPLATE_FAILED


def test_mappings_that_are_no_dicts_are_taken() -> None:
    from types import MappingProxyType

    call = MappingProxyType({"function": MappingProxyType({"name": "f"})})
    message = MappingProxyType({"role": "assistant", "content": "x", "tool_calls": (call,)})
    with served(
        "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endfor %}"
    ) as template:
        assert template.render([message]).text == "f"


def test_a_model_without_a_template_says_so() -> None:
    model = TextModel.load(build.packed(build.byte_level()))
    assert not model.has_template
    with pytest.raises(TextError) as caught:
        model.encode_chat(QUESTION)
    assert caught.value.code is TextCode.NO_TEMPLATE
    model.close()
