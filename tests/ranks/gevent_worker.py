"""A worker under gevent's patching: many requests at once while a ticker must go on ticking.

The engine is a process of its own. Prints the number of right answers and of ticks.
"""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402

from container.ranks.client import EngineClient  # noqa: E402
from container.ranks.door import make_door  # noqa: E402
from tests.ranks.doubles import collect, submit, tokens_of  # noqa: E402

REQUESTS = 50
ticks = 0


def tick() -> None:
    global ticks
    while True:
        gevent.sleep(0.01)
        ticks += 1


def ask(client: EngineClient, number: int) -> bool:
    return tokens_of(collect(submit(client, [number, number + 1], 20))) == [number, number + 1] * 10


if __name__ == "__main__":
    front_fd, engine_fd = make_door()
    command = [sys.executable, "-m", "tests.ranks.engine_process", str(engine_fd), "0.02"]
    with subprocess.Popen(command, pass_fds=[engine_fd]) as engine:
        client = EngineClient(front_fd)
        ticker = gevent.spawn(tick)
        jobs = [gevent.spawn(ask, client, number) for number in range(REQUESTS)]
        gevent.joinall(jobs, timeout=20)
        right = sum(bool(job.value) for job in jobs)
        ticker.kill()
        client.close()
        engine.kill()
    os.close(front_fd)
    os.close(engine_fd)
    print(right, ticks)
