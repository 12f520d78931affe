"""The model card of a package: `README.md` as the Hugging Face Hub reads it.

Owns: its words and its metadata header. Must not know: how anything was measured or sealed.
Invariant: every figure comes from the quality report measured on this very model; the same package gives the
same text; nothing in the header needs quoting, because what is not plain was refused before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from infra.packages import Order
from infra.report import CommandError, ExitCode

MIB: Final = 1024 * 1024
_LICENCE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
WITHOUT_WEIGHTS: Final = (
    "The unquantized weights are not in this package: it is served as what was made beforehand, on machines "
    "that have the operators for it, and as nothing else."
)
OWN_LICENCE: Final = "LicenseRef-"  # SPDX's prefix for licences that are on no list


@dataclass(frozen=True, slots=True)
class Declared:
    """What only the owner can say. Raises CommandError."""

    licence: str  # SPDX identifier, or LicenseRef-...
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not _LICENCE.fullmatch(self.licence):
            said = "`--licence` is not an SPDX identifier"
            raise CommandError(
                ExitCode.USAGE, "bad_argument", said, "as `Apache-2.0`, or `LicenseRef-NAME` of your own"
            )
        if self.base_model is not None and not _MODEL.fullmatch(self.base_model):
            said = "`--base-model` is not a model's name"
            raise CommandError(ExitCode.USAGE, "bad_argument", said, "as `OWNER/NAME`")


def text(order: Order, declared: Declared, report: dict[str, Any], files: Sequence[str]) -> str:
    """Return the card; `report` is the quality report's JSON, `files` are the package's names."""
    parts = sorted({name.split("/")[1] for name in files if name.startswith("parts/")})
    return "\n".join(
        [
            *_header(declared),
            f"# {order.name} {order.version}",
            "",
            f"{report['architecture']}, {report['parameters'] / 1e6:.0f} M parameters, as a sealed package: "
            "weights, tokenizer, chat template and configuration are encrypted, and the manifest is signed "
            "by the vendor. This page, the licence and the quality report can be read by anybody.",
            "",
            "## Quantization",
            "",
            f"Measured on this model against {report['reference']}, on {report['positions']} positions of "
            f"{report['text']}. More, and how to repeat it, in `quality.md`.",
            "",
            "| weights | MiB | perplexity | KL divergence, nats | same likeliest token |",
            "|---|---|---|---|---|",
            *(_row(row) for row in report["rows"]),
            "",
            f"Made beforehand for a quick start: {', '.join(f'`{part}`' for part in parts)}."
            if parts
            else "Nothing was made beforehand: a start divides and quantizes by itself.",
            *([] if _with_weights(files) else ["", WITHOUT_WEIGHTS]),
            "",
            *_running(order),
            *_limits(declared),
        ]
    )


def _with_weights(files: Sequence[str]) -> bool:
    return any("/" not in name and name.endswith(".safetensors") for name in files)


def _header(declared: Declared) -> list[str]:
    own = declared.licence.startswith(OWN_LICENCE)
    lines = ["---", f"license: {'other' if own else declared.licence.lower()}"]
    if own:
        lines += [
            f"license_name: {declared.licence.removeprefix(OWN_LICENCE).lower()}",
            "license_link: LICENSE",
        ]
    if declared.base_model is not None:
        lines += [f"base_model: {declared.base_model}", "base_model_relation: quantized"]
    return [*lines, "pipeline_tag: text-generation", "library_name: strongroom", "---", ""]


def _row(row: dict[str, Any]) -> str:
    quality = row["quality"]
    if quality is None:
        return f"| `{row['variant']}` | not measured: {row['refused']} | | | |"
    return (
        f"| `{row['variant']}` | {row['weight_bytes'] / MIB:.0f} | {quality['perplexity']:.3f} | "
        f"{quality['kl_mean']:.5f} | {quality['top1_agreement']:.1%} |"
    )


def _running(order: Order) -> list[str]:
    return [
        "## Running it",
        "",
        "On SageMaker, give the folder as a model data source, or the archive `model.tar.gz`; elsewhere "
        "lay the folder out at `/opt/ml/model`. The container needs the vendor's public signing key and a "
        "source of the data key; both come from the vendor, neither is in here. To prove every byte first:",
        "",
        "```sh",
        f"strongroom package verify {order.name} --root ed25519:...",
        "```",
        "",
    ]


def _limits(declared: Declared) -> list[str]:
    return [
        "## Limits",
        "",
        "- The figures above compare each form of the weights with the unquantized model on one text; they "
        "do not say how good the model is at a task, nor that it is safe for one.",
        "- A language model states falsehoods with confidence, and repeats the biases of its training data.",
        "- Without confidential-computing hardware, whoever is root on the host while the model runs can "
        "read the weights from memory.",
        "",
        "## Licence",
        "",
        f"{declared.licence}; the text is in `LICENSE`.",
        "",
    ]
