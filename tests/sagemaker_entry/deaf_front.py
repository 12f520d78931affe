"""The real front whose workers never hear SIGTERM, as one does that was forked a moment before it."""

from __future__ import annotations

import signal
import sys

from sagemaker_entry import front, worker


class Deaf(worker.Worker):
    """Ignores SIGTERM."""

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def command(*fds: int) -> list[str]:
    """Return the command line of this front, as the supervisor's own gives it for the real one."""
    from sagemaker_entry.supervisor import front_command

    listen_fd, settings_fd, door_fd, heartbeat_fd, metrics_fd = fds
    usual = front_command(listen_fd, settings_fd, door_fd, heartbeat_fd, metrics_fd)
    return [*usual[:2], "tests.sagemaker_entry.deaf_front", *usual[3:]]


if __name__ == "__main__":
    front.Worker = Deaf  # type: ignore[misc]
    front.run(sys.argv[1:], front.build_application)
