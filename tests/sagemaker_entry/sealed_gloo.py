"""Becomes the product's entry with ranks that connect to each other over loopback (gloo), as GPUs' ranks do.

Owns: that one word of the engine's configuration. Must not know: what is served.
"""

from __future__ import annotations

import sys

from sagemaker_entry import supervisor
from sagemaker_entry.__main__ import main
from tests.ranks.launch_gloo import gloo_config

if __name__ == "__main__":
    supervisor.engine_config = gloo_config
    sys.exit(main(sys.argv[1:]))
