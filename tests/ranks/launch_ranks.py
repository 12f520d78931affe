"""Starts the real supervisor and front over real ranks without a model; a process of its own for the
tests.
"""

from __future__ import annotations

import argparse
import os
import sys

from container.ranks.heartbeat import HealthLimits
from sagemaker_entry import log, settings
from sagemaker_entry.supervisor import Commands, Supervisor, engine_command

MANY_DEATHS = 1000  # for this test alone: the container would give up after three in a minute


def engine(config_fd: int, door_fd: int, heartbeat_fd: int) -> list[str]:
    fds = engine_command(config_fd, door_fd, heartbeat_fd)[3:]
    return [sys.executable, "-m", "tests.ranks.ranked_process", "good", *fds]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, required=True)
    options, _ = parser.parse_known_args()
    limits = HealthLimits(
        step_s=options.step_s, first_step_s=options.step_s, idle_beat_s=min(2.0, options.step_s)
    )
    chosen, _ = settings.read(os.environ)
    log.set_level(chosen.log_level)
    commands = Commands(engine=engine, health_limits=limits, deaths=MANY_DEATHS)
    return Supervisor(chosen, commands, os.environ).run()


if __name__ == "__main__":
    sys.exit(main())
