"""How an image was made: an in-toto statement with a SLSA provenance, in a DSSE envelope.

Owns: the statement's and the envelope's form. Must not know: how a build or a signature is made.
Invariant: what is signed is the envelope's own encoding of type and payload, never the payload alone, so a
signature made for another type does not hold.

It claims what SLSA calls build level 1, signed by whoever built; a level above needs an isolated builder.
https://slsa.dev/spec/v1.0/provenance, https://github.com/secure-systems-lab/dsse/blob/master/protocol.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from infra.release.bills import Product

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:strongroom:build-image:1"
BUILDER: Final = "urn:strongroom:builder:local"

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], None]


class ProvenanceRefused(Exception):
    """The envelope is not one, or says something of another image."""


def statement(
    product: Product, archive_sha256: str, revision: str, base_digest: str, wheels: Mapping[str, str]
) -> dict[str, Any]:
    """Return the statement; `wheels` are file name -> SHA-256 of what was installed."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": "image", "digest": {"sha256": product.image_id.removeprefix("sha256:")}},
            {"name": "image.tar", "digest": {"sha256": archive_sha256}},
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"variant": product.variant, "version": product.version},
                "internalParameters": {"SOURCE_DATE_EPOCH": product.created_s, "network": "none"},
                "resolvedDependencies": [
                    {"uri": "git+strongroom", "digest": {"gitCommit": revision}},
                    {"uri": "base", "digest": {"sha256": base_digest.removeprefix("sha256:")}},
                    *(
                        {"uri": f"wheel:{name}", "digest": {"sha256": wheels[name]}}
                        for name in sorted(wheels)
                    ),
                ],
            },
            "runDetails": {"builder": {"id": BUILDER}},
        },
    }


def seal(document: Mapping[str, Any], key_id: str, sign: Sign) -> dict[str, Any]:
    """Return the envelope over `document`, signed."""
    payload = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    signature = sign(encoded(PAYLOAD_TYPE, payload))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id, "sig": base64.b64encode(signature).decode()}],
    }


def open_sealed(envelope: Mapping[str, Any], verify: Verify) -> dict[str, Any]:
    """Return the statement in an envelope; raises ProvenanceRefused, and what `verify` raises."""
    try:
        kind, payload = envelope["payloadType"], base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        signed = base64.b64decode(signature["sig"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ProvenanceRefused("the provenance is no signed envelope") from error
    if kind != PAYLOAD_TYPE:
        raise ProvenanceRefused("the provenance holds no in-toto statement")
    verify(encoded(kind, payload), signed)
    document: dict[str, Any] = json.loads(payload)
    if (document.get("_type"), document.get("predicateType")) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ProvenanceRefused("the provenance is of another kind")
    return document


def encoded(kind: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding."""
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)
