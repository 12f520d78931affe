"""`python -m container.ranks`: the engine process. Owns nothing but the exit."""

import sys

from container.ranks.main import main

if __name__ == "__main__":
    sys.exit(main())
