"""Rotary position encodings that serve many sequences at once: known kinds only, chosen once, then fixed.

Owns: which kinds of scaling are served, how far they reach, freezing those that depend on length.
Must not know: weights, KV, plans; transformers computes every frequency.
Invariant: after `freeze_positions` no forward changes a frequency, however long the sequences in it.

    fixed        default, linear, yarn, llama3, proportional: the same at every length
    by length    longrope (short or long factors), dynamic (base grows with the sequence): taken as for one
                 sequence of the longest length to be served, for all sequences
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

FIXED: Final = ("default", "linear", "yarn", "llama3", "proportional")
BY_LENGTH: Final = ("longrope", "dynamic")
GIVEN: Final = "strongroom_rope_type"  # on a frozen module: what its `rope_type` was


class UnknownPositions(Exception):
    """The configuration asks for a kind of rotary encoding that is not served; the text names it."""


def check_positions(text_config: Any) -> None:
    """Raise UnknownPositions unless every layer's rotary encoding is of a known kind."""
    for rope in _settings(text_config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in (*FIXED, *BY_LENGTH):
            known = ", ".join((*FIXED, *BY_LENGTH))
            raise UnknownPositions(f"`rope_type` is {str(kind)[:40]!r}\nhint: choose one of {known}")


def reach_tokens(text_config: Any, window: int) -> tuple[int, int]:
    """Return the lengths to serve when none is asked for, and at most, for a model made for `window` tokens.

    Yarn is stretched at every length, so its whole reach is offered. Dynamic scaling blurs short sequences
    to reach further, so it is only stretched for an operator who asks for more than `window`.
    """
    reaches = [_reach(rope, window) for rope in _settings(text_config)]
    if not reaches:
        return window, window
    return min(default for default, _ in reaches), min(longest for _, longest in reaches)


def _reach(rope: Mapping[str, Any], window: int) -> tuple[int, int]:
    factor = rope.get("factor")
    if not isinstance(factor, int | float):
        return window, window
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or window
        longest = max(window, int(original * factor))
        return longest, longest
    if rope.get("rope_type") == "dynamic":
        return window, max(window, int(window * factor))
    return window, window


def _settings(text_config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of each kind of layer, or the only ones; none where positions are not rotary."""
    rope = getattr(text_config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    yield from nested or [rope]


def reaches_alike(text_config: Any) -> bool:
    """Return whether frequencies are the same at every length, in all layers: they can be told once."""
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in _settings(text_config)]
    return len(kinds) == 1 and kinds[0] in FIXED


def freeze_positions(model: Any, sequence_tokens: int) -> None:
    """Fix the frequencies of length-dependent rotary encodings for sequences of `sequence_tokens`.

    transformers picks them from the largest position in the batch, so that one long request would change the
    keys of all others and spoil cached ones. May be called again with another length.
    """
    for module in model.modules():
        kinds = getattr(module, GIVEN, None) or getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds in BY_LENGTH:
            module.rope_type = kinds
            _choose(module, sequence_tokens)
            module.rope_type = "default"
            setattr(module, GIVEN, kinds)
        elif isinstance(kinds, dict) and any(kind in BY_LENGTH for kind in kinds.values()):
            module.rope_type = dict(kinds)
            for layer_type, kind in kinds.items():
                if kind in BY_LENGTH:
                    _choose(module, sequence_tokens, layer_type)
            module.rope_type = {name: "default" if k in BY_LENGTH else k for name, k in kinds.items()}
            setattr(module, GIVEN, dict(kinds))


def _choose(module: Any, sequence_tokens: int, layer_type: str | None = None) -> None:
    """Let the module set its frequencies as a lone sequence of `sequence_tokens` would."""
    import torch  # not wherever the length of a window is asked for

    prefix = "" if layer_type is None else f"{layer_type}_"
    # Dynamic scaling grows from the longest sequence met so far: back to where it began.
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    getattr(module, f"{prefix}inv_freq").copy_(getattr(module, f"{prefix}original_inv_freq"))
    last = torch.tensor([[sequence_tokens - 1]])
    module(torch.zeros(1), last, **({} if layer_type is None else {"layer_type": layer_type}))
