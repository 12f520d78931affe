"""Variables of other servers that an operator's environment may hold.

Owns: which of them are passed over, and which only with a harmless value. Must not know: our own settings.
Invariant: nothing that would change an answer is passed over.
"""

from __future__ import annotations

from typing import Final

# What users of text-generation-inference have in their environment and what we do not need.
IGNORED: Final = (
    "HF_MODEL_REVISION",
    "MAX_BATCH_PREFILL_TOKENS",
    "MAX_BATCH_TOTAL_TOKENS",
    "MAX_CLIENT_BATCH_SIZE",
    "WAITING_SERVED_RATIO",
    "MAX_WAITING_TOKENS",
    "SPECULATE",
    "API_KEY",
    "CORS_ALLOW_ORIGIN",
    "PORT",
    "PROMETHEUS_PORT",
    "GRACEFUL_TERMINATION_TIMEOUT",
    "USAGE_STATS",
)
_NO_ADAPTERS: Final = "adapters are not served; merge the adapter into the model's weights"
# Names that may be present with one harmless value only: variable -> (allowed values, hint).
GUARDED: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "HF_MODEL_TRUST_REMOTE_CODE": (
        ("", "0", "false", "False"),
        "code from a model artifact is never executed; unset the variable",
    ),
    "SAGEMAKER_MULTI_MODEL": (
        ("", "false", "False"),
        "one container serves one model; give each model an endpoint or an inference component of its own",
    ),
    "LORA_ADAPTERS": (("",), _NO_ADAPTERS),
    "OPTION_ENABLE_LORA": (("", "false", "False"), _NO_ADAPTERS),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": (("", "0", "false", "False"), _NO_ADAPTERS),
}
