"""The real front with a short write deadline, for tests of clients that do not read."""

from __future__ import annotations

import sys

from sagemaker_entry import connection, front

WRITE_S = 1.0


def command(*fds: int) -> list[str]:
    """Return the command line of this front, as the supervisor's own gives it for the real one."""
    from sagemaker_entry.supervisor import front_command

    listen_fd, settings_fd, door_fd, heartbeat_fd, metrics_fd = fds
    usual = front_command(listen_fd, settings_fd, door_fd, heartbeat_fd, metrics_fd)
    return [*usual[:2], "tests.sagemaker_entry.quick_front", *usual[3:]]


if __name__ == "__main__":
    connection.WRITE_S = WRITE_S  # type: ignore[misc]
    front.run(sys.argv[1:], front.build_application)
