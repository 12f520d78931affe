"""What stops a model from being loaded.

Owns: the exceptions of loading and dividing. Knows nothing else.
Invariant: a text names sizes and rules, never a tensor, a path or content.
"""

from __future__ import annotations


class LoadError(Exception):
    """The model cannot be built from its files; the text names the rule, never a tensor."""


class ShardRefused(LoadError):
    """The model cannot be divided among so many ranks; the text names sizes and rules."""
