"""Numbers every dialect holds sampling parameters and prompts to, with their reasons.

Owns: bounds that do not depend on the model. Must not know: any dialect's field names.
Invariant: whatever passes these bounds is finite in float32 on every runner.
"""

from __future__ import annotations

from typing import Final

from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import ModelLimits

# Below this a logit of 1,000 divided by the temperature nears float32's end; 1e-300 is 0 there. Clients do
# send 1e-8 to mean "almost greedy", since TGI refuses 0.
MIN_TEMPERATURE: Final = 1e-8
MAX_TEMPERATURE: Final = 100.0
MIN_PROBABILITY: Final = 1e-8  # top-p, typical-p: smaller is 0 in float32 arithmetic
MIN_REPETITION_PENALTY: Final = 0.01
MAX_REPETITION_PENALTY: Final = 100.0
MAX_PENALTY: Final = 2.0  # frequency and presence, both signs
MAX_TOP_K: Final = 2**31 - 1
MAX_BIAS: Final = 100.0


def check_prompt_bytes(prompt_bytes: int, limits: ModelLimits) -> None:
    """Refuse text that cannot fit before it costs a tokenization (1 MB of one letter takes seconds)."""
    most = limits.sequence_tokens * limits.prompt_bytes_per_token
    if prompt_bytes > most:
        raise ApiError(
            Code.CONTEXT_LENGTH, limit=limits.sequence_tokens, prompt_tokens=f"more than {most} bytes"
        )


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
