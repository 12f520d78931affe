"""An engine process without a model: the real host over a FakeEngine, to be killed by tests.

python -m tests.ranks.engine_process DOOR_FD STEP_S
"""

import sys

from container.ranks.heartbeat import HeartbeatWriter, make_page
from container.ranks.host import Host
from container.ranks.switchboard import Switchboard
from tests.ranks.doubles import WELCOME, FakeEngine

if __name__ == "__main__":
    with HeartbeatWriter(make_page()) as page:
        Host(FakeEngine(step_s=float(sys.argv[2])), Switchboard(int(sys.argv[1]), WELCOME), page).run()
