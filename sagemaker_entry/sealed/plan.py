"""What a start from a sealed package is told: from settings to one frozen struct for the engine's ranks.

Owns: whether a start is sealed, which settings that demands, the struct, a rank's command line.
Must not know: keys, files.
Invariant: nothing is read here, and there is no way from a sealed start to a plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from container.ranks.process import interpreter
from sagemaker_entry.settings import Settings, SettingsError, variable

MAX_BYTES: Final = 64 * 1024
ALLOW: Final = f"or set `{variable('allow_plaintext')}=on` to serve a model that is not sealed"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that a rank needs to open the package, but the key."""

    key: str  # the key's source, KEYS.md
    owner: str  # "vendor" or "customer"
    roots: tuple[tuple[str, int | None], ...]  # public key as text, the second after which it is not accepted
    min_epoch: int
    prove_whole: bool
    state_dir: str | None
    started_s: int  # when the container started: dates are judged at this moment, also by a later engine
    image_version: str


def plan(settings: Settings, started_s: int, image_version: str) -> Plan | None:
    """Return the plan, None where the operator allows a model that is not sealed; raises SettingsError."""
    if settings.allow_plaintext == "on":
        return None
    key, vendor, customer = settings.key, settings.vendor_roots, settings.customer_roots
    if key is None:
        raise SettingsError(
            f"`{variable('key')}` is not set, and this endpoint serves sealed packages alone",
            f"name the key's source, such as `file:/run/secrets/key`, {ALLOW}",
        )
    if (vendor is None) == (customer is None):
        names = f"`{variable('vendor_roots')}` or `{variable('customer_roots')}`"
        raise SettingsError(
            f"one of {names} says who may have signed the package",
            f"give the public key of the one party whose package this is, {ALLOW}",
        )
    return Plan(
        key=key,
        owner="customer" if vendor is None else "vendor",
        roots=_roots(vendor or customer or ""),
        min_epoch=settings.min_epoch,
        prove_whole=settings.verify == "full",
        state_dir=settings.state_dir,
        started_s=started_s,
        image_version=image_version,
    )


def rank_command(role: str, fds: Mapping[str, int]) -> list[str]:
    """Return the command line of a rank ("engine" or "follower"), to be followed by what its role needs."""
    told = (str(part) for pair in fds.items() for part in pair)
    return [*interpreter(), "-m", "sagemaker_entry.sealed.rank", role, *told]


def _roots(text: str) -> tuple[tuple[str, int | None], ...]:
    found = []
    for each in text.split(","):
        key, at, end = each.partition("@")
        found.append((key, int(end) if at else None))
    return tuple(found)


def encode(told: Plan) -> bytes:
    """Return `told` as JSON."""
    return msgspec.json.encode(told)


def decode(raw: bytes) -> Plan:
    """Return the plan in `raw`; raises msgspec.DecodeError."""
    return msgspec.json.decode(raw, type=Plan)
