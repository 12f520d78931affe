"""A vendor and a customer with their keys, and small packages of theirs.

Owns: who holds what in the tests of keys. Must not know: what is tested.
Invariant: nothing here is shared between the two but public keys.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from model_package import hpke, licence, licence_form, signing_keys
from model_package.licence import Licensing
from model_package.licence_form import Licence, Terms
from model_package.manifest import Base, Manifest, Model
from model_package.opener import Trust, open_package
from model_package.recipients import Owner
from model_package.sealer import Sealing, Wrap, seal, to_public_keys
from model_package.signature import Root, Roots

NOW_S = 1_800_000_000
DAY_S = 86_400
CONTENT = b"the content of the one file of a package\n"


@dataclass
class Party:
    """One side's private halves; `wrap` is how its packages' data keys are wrapped."""

    owner: Owner
    signing: bytearray = field(default_factory=signing_keys.make_private)
    recipient: bytearray = field(default_factory=hpke.make_private)

    @property
    def root(self) -> Root:
        return Root(signing_keys.public_of(self.signing))

    def seal(
        self,
        folder: Path,
        data_key: bytearray,
        base: Base | None = None,
        epoch: int = 5,
        wrap: Wrap | None = None,
    ) -> Manifest:
        """Seal a package of one small file into `folder`."""
        plain = folder.with_name(folder.name + ".plain")
        plain.write_bytes(CONTENT)
        told = Sealing(self.owner, Model("tiny", "1"), created_s=NOW_S, epoch=epoch, base=base)
        return seal(
            {"config.json": plain},
            folder,
            told,
            data_key,
            wrap or to_public_keys([hpke.public_of(self.recipient)]),
            self.signing,
        )


def vendor() -> Party:
    return Party(Owner.VENDOR)


def customer() -> Party:
    return Party(Owner.CUSTOMER)


def trust(owner: Owner, vendors: Party, customers: Party, base: Base | None = None, epoch: int = 0) -> Trust:
    """What a container is told: whose package it must be, and both roots."""
    return Trust(owner, Roots((vendors.root,), (customers.root,)), NOW_S, epoch, base)


def content(folder: Path, trusted: Trust, data_key: bytearray) -> bytes | None:
    """Open the package in `folder` and return its one file."""
    with open_package(folder, trusted) as package, package.unlock(data_key) as contents:
        return contents.file("config.json")


def terms(*package_ids: str, days: int = 30, epoch_min: int = 0) -> Terms:
    return Terms(
        customer="Example & Sons (Rome)",
        epoch_min=epoch_min,
        features=("adapters", "tensor-parallel"),
        format=1,
        id="2026-0042",
        not_after_s=NOW_S + days * DAY_S,
        not_before_s=NOW_S - DAY_S,
        package_ids=tuple(sorted(package_ids)),
    )


def issue(
    path: Path, issuer: Party, agreed: Terms, data_keys: dict[str, bytearray], *installations: bytes
) -> Licence:
    """Make, sign and write a licence as the vendor does."""
    made = licence.make(agreed, data_keys, installations)
    path.write_bytes(licence_form.sign(made, issuer.signing))
    return made


def licensing(
    issuer: Party, now_s: int = NOW_S, state: Path | None = None, started: bool = False
) -> Licensing:
    return Licensing((issuer.root,), lambda: now_s, state, started)


def fresh_key() -> bytearray:
    return bytearray(os.urandom(32))
