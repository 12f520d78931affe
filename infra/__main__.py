"""`python -m infra`: the same command line without an installation."""

from infra.cli import main

if __name__ == "__main__":
    main()
