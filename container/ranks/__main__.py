"""`python -m container.ranks`: the engine process. Owns nothing but the exit."""

import os

from container.ranks.main import main

if __name__ == "__main__":
    os._exit(main())  # without finalizing: native threads of a broken group may never end
