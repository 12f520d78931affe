"""Names for prefixes: a SHA-256 chain over blocks of tokens, salted per tenant.

Owns: the boot key, the derivation of roots and keys.
Must not know: blocks, sequences, policy. Standard library only.
Invariant: two prefixes share a key only if tenant, client salt, model and every token are equal.

    salt   = HMAC-SHA256(boot key, tenant)            the tenant is set by the server
    root   = SHA-256(domain | salt | client salt | model)
    key[i] = SHA-256(key[i-1] | tokens of block i)    key[-1] = root

Short or guessable hashes let one tenant read another's cache: CVE-2025-25183, CVE-2025-46570.
Tokens are hashed in native byte order; keys never leave the process.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from typing import Final

DOMAIN: Final = b"strongroom/prefix/v1"
MIN_BOOT_KEY_BYTES: Final = 16  # below 128 bits a tenant's salt could be guessed


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(4, "little") + part


class PrefixNames:
    """Derives roots from a key that lives as long as the process. Raises ValueError on a short key."""

    def __init__(self, boot_key: bytes, model_identity: bytes = b"") -> None:
        if len(boot_key) < MIN_BOOT_KEY_BYTES:
            raise ValueError(f"`boot_key` must have at least {MIN_BOOT_KEY_BYTES} bytes, got {len(boot_key)}")
        self._boot_key = boot_key
        self._model_identity = model_identity

    def __repr__(self) -> str:
        return "PrefixNames()"

    def root(self, tenant: str, cache_salt: str) -> bytes:
        """Return the start of every chain of this tenant and client salt: 32 bytes."""
        salt = hmac.digest(self._boot_key, tenant.encode(), "sha256")
        parts = (DOMAIN, salt, cache_salt.encode(), self._model_identity)
        return hashlib.sha256(b"".join(map(_framed, parts))).digest()


def chain(previous: bytes, tokens: bytes) -> bytes:
    """Return the key of the block holding `tokens` behind the prefix named `previous`: 32 bytes."""
    return hashlib.sha256(previous + tokens).digest()


def extend(keys: list[bytes], root: bytes, history: array[int], block_tokens: int, blocks: int) -> None:
    """Append to `keys` until it names the first `blocks` full blocks of `history`; each is hashed once."""
    for index in range(len(keys), blocks):
        previous = keys[index - 1] if index else root
        keys.append(chain(previous, block_bytes(history, block_tokens, index)))


def block_bytes(history: array[int], block_tokens: int, index: int) -> bytes:
    """Return the tokens of block `index` as bytes."""
    return history[index * block_tokens : (index + 1) * block_tokens].tobytes()
