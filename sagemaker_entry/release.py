"""Which release this is. Owns: the version's one source. Must not know: who asks."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version of the installed package, or of none."""
    try:
        return version("strongroom")
    except PackageNotFoundError:
        return "0"
