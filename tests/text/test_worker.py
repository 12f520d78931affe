"""The processes that render: bounded, private, replaced when they die, gone when we are done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from container.text.errors import TextCode, TextError
from tests.text.serve import GO, QUESTION, on_demand, served

ROOT = Path(__file__).parents[2]


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
