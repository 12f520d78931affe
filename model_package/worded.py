"""The base of refusals that have one class each: a message and the next move.

Owns: that pair. Must not know: what is refused. Invariant: neither names a secret, a path or content.
"""

from __future__ import annotations


class WordedError(Exception):
    """Each subclass says `message` and `hint` once, for whoever shows them."""

    message = ""
    hint = ""
