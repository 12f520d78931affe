"""Starts the real supervisor and front over ranks that connect to each other over loopback (gloo); a process
of its own for the tests.
"""

from __future__ import annotations

import os
import sys

import msgspec

from container.ranks.config import EngineConfig
from sagemaker_entry import log, settings, supervisor

told = supervisor.engine_config


def gloo_config(chosen: settings.Settings) -> EngineConfig:
    return msgspec.structs.replace(told(chosen), collectives="gloo")


def engine(config_fd: int, door_fd: int, heartbeat_fd: int) -> list[str]:
    fds = supervisor.engine_command(config_fd, door_fd, heartbeat_fd)[3:]
    return [sys.executable, "-m", "tests.ranks.ranked_process", "gloo", *fds]


if __name__ == "__main__":
    supervisor.engine_config = gloo_config
    read, _ = settings.read(os.environ)
    log.set_level(read.log_level)
    sys.exit(supervisor.Supervisor(read, supervisor.Commands(engine=engine), os.environ).run())
