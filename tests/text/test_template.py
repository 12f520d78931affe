"""Templates render in a bounded child: bombs end there, and nothing but text comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from container.text.errors import TextCode, TextError
from container.text.model import TextModel
from container.text.template import ChatTemplate
from container.text.worker import START_S
from tests.text import build

QUESTION = [{"role": "user", "content": "hi"}]
GO = [{"role": "user", "content": "go"}]
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def served(source: str, **options: Any) -> Iterator[ChatTemplate]:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"}, **options)
    try:
        yield template
    finally:
        template.close()


def on_demand(bomb: str) -> str:
    """Return a template that renders harmlessly until a message says `go`."""
    return "{% if messages[0].content == 'go' %}" + bomb + "{% else %}fine{% endif %}"


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


def test_a_render_that_uses_no_cpu_is_ended_by_the_wall_clock() -> None:
    with served("fine", render_s=0.3) as template:
        (pid,) = template.pids
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(TextError) as caught:
            template.render(QUESTION)
        assert caught.value.code is TextCode.TEMPLATE_TIMEOUT
        assert time.monotonic() - started < 2
        assert gone(pid)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_child_that_died_between_requests_is_replaced() -> None:
    with served("fine") as template:
        (pid,) = template.pids
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert template.render(QUESTION).text == "fine"
        assert gone(pid)


def test_closing_leaves_no_process_and_can_be_repeated() -> None:
    with served("fine") as template:
        pids = template.pids
        assert pids and not any(map(gone, pids))
        template.close()
        assert all(map(gone, pids))
        template.close()
        with pytest.raises(TextError):
            template.render(QUESTION)


def test_the_child_has_no_environment_and_no_file_but_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_SECRET", "canary")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)  # as a listening socket handed down by a supervisor is
    try:
        with served("fine") as template:
            process = Path(f"/proc/{template.pids[0]}")
            assert process.joinpath("environ").read_bytes() == b""
            files = {path.name: os.readlink(path) for path in process.joinpath("fd").iterdir()}
            assert files.pop("0").startswith("socket:")
            assert files == {"1": os.devnull, "2": os.devnull}
            limits = process.joinpath("limits").read_text()
            assert f"Max address space         {256 * 2**20}" in limits
            assert "Max core file size        0 " in limits
    finally:
        os.close(reader)
        os.close(writer)


def test_the_child_knows_jinja_and_not_the_tokenizer() -> None:
    script = "import sys, container.text.sandbox; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "jinja2" in found
    assert not {"tokenizers", "torch", "transformers", "numpy", "flask", "gevent"} & set(found)


def test_the_front_never_imports_jinja() -> None:
    script = "import sys, container.text.model, container.text.stream; print('jinja2' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "False"


def test_many_threads_get_their_own_answers() -> None:
    answers: dict[int, str] = {}
    with served("{{ messages[0].content }}") as template:

        def ask(number: int) -> None:
            for turn in range(20):
                answers[number * 100 + turn] = template.render(
                    [{"role": "user", "content": f"{number}-{turn}"}]
                ).text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(template.pids) <= 2
    assert answers == {n * 100 + t: f"{n}-{t}" for n in range(8) for t in range(20)}


def test_one_stuck_render_does_not_hold_up_the_others() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    codes: list[TextCode] = []
    with served(on_demand(loop)) as template:

        def stick() -> None:
            try:
                template.render(GO)
            except TextError as error:
                codes.append(error.code)

        stuck = threading.Thread(target=stick)
        stuck.start()
        time.sleep(0.1)
        answered = 0
        while stuck.is_alive():
            assert template.render(QUESTION).text == "fine"
            answered += 1
        stuck.join()
    assert answered >= 5
    assert codes == [TextCode.TEMPLATE_TIMEOUT]


def test_a_gevent_process_goes_on_while_a_render_is_stuck() -> None:
    script = """
from gevent import monkey; monkey.patch_all()
import gevent, time
from container.text.errors import TextError
from container.text.template import ChatTemplate
from container.text.worker import START_S
loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
source = "{% if messages[0].content == 'go' %}" + loop + "{% endif %}fine"
template = ChatTemplate({"default": source}, {})
ticks = []
def tick():
    while True:
        ticks.append(time.monotonic()); gevent.sleep(0.02)
ticker = gevent.spawn(tick)
def render(text):
    try: return template.render([{"role": "user", "content": text}]).text
    except TextError as error: return error.code.value
jobs = [gevent.spawn(render, text) for text in ("go", "a", "b", "c", "d")]
gevent.joinall(jobs, timeout=20)
ticker.kill()
template.close()
print([job.value for job in jobs], max(b - a for a, b in zip(ticks, ticks[1:])) < 0.7, len(ticks) > 20)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr == ""
    assert result.stdout.strip() == "['template_timeout', 'fine', 'fine', 'fine', 'fine'] True True"


def test_a_forked_process_starts_its_own_child() -> None:
    """Two processes on one socket would read each other's conversations."""
    with served("{{ messages[0].content }}") as template:
        inherited = template.pids
        pid = os.fork()
        if pid == 0:
            answer = template.render([{"role": "user", "content": "mine"}]).text
            own = template.pids
            template.close()
            os._exit(0 if answer == "mine" and not set(own) & set(inherited) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert template.render(QUESTION).text == "hi"
        assert template.pids == inherited


def test_a_process_forked_under_gevent_starts_its_own_child() -> None:
    """gevent answers for children it remembers from before the fork: asking it is not enough."""
    script = """
from gevent import monkey; monkey.patch_all()
import os
from container.text.template import ChatTemplate
template = ChatTemplate({"default": "fine"}, {})
inherited = template.pids
pid = os.fork()
if pid == 0:
    answer = template.render([]).text
    own = template.pids
    template.close()
    os._exit(0 if answer == "fine" and not set(own) & set(inherited) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), template.pids == inherited)
template.close()
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.strip() == "0 True"


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


def test_the_time_of_one_render_does_not_count_against_the_next() -> None:
    loop = "{% for a in range(1000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    with served(on_demand(loop + "done")) as template:
        before = template.pids
        started_s = cpu_s(before[0])
        while cpu_s(before[0]) - started_s < 3:  # more than any one render may take
            assert template.render(GO).text == "done"
        assert template.pids == before


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
