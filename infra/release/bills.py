"""The bills of materials: CycloneDX 1.6 and SPDX 2.3 over the same components.

Owns: the two forms. Must not know: how components are found.
Invariant: a form depends on the components and the product's facts alone, so that two builds of one commit
have the same bills; both name every component by its package URL.

https://cyclonedx.org/docs/1.6/json, https://spdx.github.io/spdx-spec/v2.3.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from infra.release.components import Component

CYCLONEDX_SCHEMA: Final = "http://cyclonedx.org/schema/bom-1.6.schema.json"
NAMESPACE: Final = uuid.UUID("5d2c1b0e-7a43-5c7e-9a52-0f7f6f3f8b61")  # ours, for names made of contents
NOT_SAID: Final = "NOASSERTION"
OWN_LICENCE: Final = "Apache-2.0"


@dataclass(frozen=True, slots=True)
class Product:
    """The image that a bill is of; `image_id` is its docker id, `created_s` its own time."""

    name: str
    version: str
    variant: str
    image_id: str
    manifest_digest: str
    created_s: int

    @property
    def created(self) -> str:
        return datetime.fromtimestamp(self.created_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def purl(self) -> str:
        """The image's own package URL."""
        digest = self.manifest_digest.replace(":", "%3A")
        return f"pkg:oci/{self.name}@{digest}?tag={self.version}-{self.variant}"

    def identifier(self, form: str) -> uuid.UUID:
        """Return an identifier of the bill in `form` that only another image would change."""
        return uuid.uuid5(NAMESPACE, f"{form}\0{self.image_id}")


def cyclonedx(product: Product, components: Sequence[Component]) -> dict[str, Any]:
    """Return the CycloneDX 1.6 document."""
    return {
        "$schema": CYCLONEDX_SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{product.identifier('cyclonedx')}",
        "version": 1,
        "metadata": {
            "timestamp": product.created,
            "lifecycles": [{"phase": "post-build"}],
            "component": {
                "type": "container",
                "bom-ref": product.purl,
                "name": product.name,
                "version": f"{product.version}-{product.variant}",
                "purl": product.purl,
                "hashes": [{"alg": "SHA-256", "content": product.image_id.removeprefix("sha256:")}],
                "licenses": [{"license": {"id": OWN_LICENCE}}],
            },
        },
        "components": [_cyclonedx_part(one) for one in components],
        "dependencies": [{"ref": product.purl, "dependsOn": [one.purl for one in components]}],
    }


def _cyclonedx_part(one: Component) -> dict[str, Any]:
    part: dict[str, Any] = {
        "type": "library",
        "bom-ref": one.purl,
        "name": one.name,
        "version": one.version,
        "purl": one.purl,
        "properties": [{"name": "strongroom:content-sha256", "value": one.content_sha256}],
    }
    if one.licence is not None:
        part["licenses"] = [{"expression": one.licence}]
    elif one.licence_text is not None:
        part["licenses"] = [{"license": {"name": one.licence_text}}]
    return part


def spdx(product: Product, components: Sequence[Component]) -> dict[str, Any]:
    """Return the SPDX 2.3 document."""
    identifier = product.identifier("spdx")
    root = "SPDXRef-image"
    parts = [(f"SPDXRef-{number}-{_reference(one)}", one) for number, one in enumerate(components)]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{product.name}-{product.version}-{product.variant}",
        "documentNamespace": f"urn:uuid:{identifier}",
        "creationInfo": {"created": product.created, "creators": ["Tool: strongroom-release"]},
        "documentDescribes": [root],
        "packages": [
            {
                "SPDXID": root,
                "name": product.name,
                "versionInfo": f"{product.version}-{product.variant}",
                "downloadLocation": NOT_SAID,
                "filesAnalyzed": False,
                "licenseConcluded": NOT_SAID,
                "licenseDeclared": OWN_LICENCE,
                "copyrightText": NOT_SAID,
                "primaryPackagePurpose": "CONTAINER",
                "externalRefs": [_reference_by_purl(product.purl)],
            },
            *(_spdx_part(reference, one) for reference, one in parts),
        ],
        "relationships": [_relation("SPDXRef-DOCUMENT", "DESCRIBES", root)]
        + [_relation(root, "CONTAINS", reference) for reference, _ in parts],
    }


def _spdx_part(reference: str, one: Component) -> dict[str, Any]:
    part: dict[str, Any] = {
        "SPDXID": reference,
        "name": one.name,
        "versionInfo": one.version,
        "downloadLocation": NOT_SAID,
        "filesAnalyzed": False,
        "licenseConcluded": NOT_SAID,
        "licenseDeclared": one.licence or NOT_SAID,
        "copyrightText": NOT_SAID,
        "externalRefs": [_reference_by_purl(one.purl)],
    }
    if one.licence is None and one.licence_text is not None:
        part["licenseComments"] = one.licence_text
    return part


def purls_of(document: dict[str, Any]) -> set[str]:
    """Return the package URLs of the parts that either form names."""
    if "bomFormat" in document:
        return {part["purl"] for part in document["components"]}
    described = set(document["documentDescribes"])
    return {
        part["externalRefs"][0]["referenceLocator"]
        for part in document["packages"]
        if part["SPDXID"] not in described
    }


def _reference(one: Component) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", f"{one.kind}-{one.name}")


def _reference_by_purl(purl: str) -> dict[str, str]:
    return {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}


def _relation(one: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}
