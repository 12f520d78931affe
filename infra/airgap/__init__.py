"""The air-gapped bundle: one signed folder that is verified, loaded and run where there is no network.

`bin/` is what travels along: POSIX shell that needs sh, coreutils, openssl 3.0 and, to load and run, docker.
"""
