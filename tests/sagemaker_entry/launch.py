"""Starts the real supervisor and front with the fake engine; a process of its own for the tests."""

from __future__ import annotations

import argparse
import os
import resource
import sys

from container.ranks.heartbeat import HealthLimits
from sagemaker_entry import log, settings
from sagemaker_entry.supervisor import Commands, Supervisor, engine_command, front_command
from tests.sagemaker_entry import deaf_front, quick_front

FRONTS = {"real": front_command, "quick": quick_front.command, "deaf": deaf_front.command}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--status", required=True)
    parser.add_argument("--load-s", default="0")
    parser.add_argument("--step-s", type=float, default=10.0)
    parser.add_argument("--fault", default="NONE")
    parser.add_argument("--grammar", choices=("yes", "no"), default="yes")
    parser.add_argument("--nofile", type=int, default=0)
    parser.add_argument("--front", choices=tuple(FRONTS), default="real")
    options = parser.parse_args()

    def engine(config_fd: int, door_fd: int, heartbeat_fd: int) -> list[str]:
        fds = engine_command(config_fd, door_fd, heartbeat_fd)[3:]
        program = [sys.executable, "-m", "tests.sagemaker_entry.fake_engine"]
        return [
            *program,
            *fds,
            "--status",
            options.status,
            "--load-s",
            options.load_s,
            "--fault",
            options.fault,
            "--grammar",
            options.grammar,
        ]

    limits = HealthLimits(step_s=options.step_s, idle_beat_s=min(2.0, options.step_s))
    if options.nofile:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.nofile, options.nofile))
    chosen, _ = settings.read(os.environ)
    log.set_level(chosen.log_level)
    commands = Commands(engine, FRONTS[options.front], limits)
    return Supervisor(chosen, commands, os.environ).run()


if __name__ == "__main__":
    sys.exit(main())
