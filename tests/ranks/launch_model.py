"""Starts the real supervisor over the real engine and front, as the container does but for how many deaths it
forgives; a process of its own for the tests.
"""

from __future__ import annotations

import os
import sys

from sagemaker_entry import log, settings
from sagemaker_entry.supervisor import Commands, Supervisor
from tests.ranks.launch_ranks import MANY_DEATHS


def main() -> int:
    chosen, _ = settings.read(os.environ)
    log.set_level(chosen.log_level)
    return Supervisor(chosen, Commands(deaths=MANY_DEATHS), os.environ).run()


if __name__ == "__main__":
    sys.exit(main())
