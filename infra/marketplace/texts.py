"""The pages of a listing, as Markdown.

Owns: what each page says, from the facts alone. Must not know: the folder, AWS's answers.
Invariant: the same facts give the same bytes; a figure on a page carries its machine, command and date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from infra.marketplace import samples
from infra.marketplace.request import BATCH_CALLS, BATCH_PAYLOAD_MB, arn_map
from infra.marketplace.rules import METERING_DIMENSION
from infra.marketplace.vendor import STANDARD_CONTRACT, Pricing
from infra.templates.instances import BATCH_HOST_IMAGE, ENDPOINT, host_image

if TYPE_CHECKING:
    from infra.marketplace.folder import Facts

COLUMNS: Final = {
    "output_tok_s": "output tokens/s",
    "first_token_p50_s": "first token, median s",
    "first_token_p95_s": "first token, p95 s",
    "latency_p50_s": "answer, median s",
    "latency_p95_s": "answer, p95 s",
}


def pages(facts: Facts) -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {name: make(facts).rstrip("\n") + "\n" for name, make in PAGES.items()}


def _description(facts: Facts) -> str:
    product = facts.vendor.product
    return "\n".join(
        [
            f"# {product.title}",
            "",
            product.short_description,
            "",
            product.overview.strip(),
            "",
            f"For: {product.customer}",
            "",
            "Highlights:",
            *(f"- {text}" for text in product.highlights),
            "",
            "Uses:",
            *(f"- {text}" for text in product.use_cases),
            "",
            "## How it was trained",
            "",
            product.training_data.strip(),
            "",
            "## Limitations",
            "",
            *(f"- {text}" for text in product.limitations),
            "",
            "## Quality, measured",
            "",
            *_quality(facts),
            "",
            "## Speed, measured",
            "",
            *_speed(facts),
            "",
            "## What stays where",
            "",
            "Prompts and answers stay in your account: the container runs with network isolation, has no "
            "credentials, and writes no prompt and no answer to a log. The vendor's weights are sealed; the "
            "copy that AWS Marketplace keeps cannot be read by buyers, which is the platform's promise.",
            "",
            f"Keywords: {', '.join(product.keywords)}",
        ]
    )


def _quality(facts: Facts) -> list[str]:
    if facts.quality is None:
        return ["No quality figures were given for this version."]
    held, origin = facts.quality, facts.quality.origin
    return [
        f"What quantization (`{held.variant}`) costs, on {held.positions} positions of {held.text}:",
        "",
        "| | this model | unquantized |",
        "|---|---|---|",
        f"| perplexity | {held.perplexity:.4f} | {held.reference_perplexity:.4f} |",
        f"| same most likely token | {held.top1_agreement:.2%} | |",
        f"| divergence (KL), mean | {held.kl_mean:.5f} | |",
        "",
        f"`{origin.command}`, {origin.date}, {origin.machine}; results file {origin.sha256[:16]}.",
    ]


def _speed(facts: Facts) -> list[str]:
    lines: list[str] = []
    for origin in dict.fromkeys(one.origin for one in facts.speeds):
        held = [one for one in facts.speeds if one.origin == origin]
        shown = [name for name in COLUMNS if any(name in one.figures for one in held)]
        on = origin.instance_type or "a machine that is no SageMaker instance"
        lines += [
            f"On {on} ({origin.machine}):",
            "",
            f"| workload | configuration | {' | '.join(COLUMNS[name] for name in shown)} | rounds |",
            "|---" * (len(shown) + 3) + "|",
            *(
                f"| {one.workload} | {one.engine} | "
                + " | ".join(f"{one.figures[name]:.3g}" if name in one.figures else "" for name in shown)
                + f" | {one.rounds} |"
                for one in held
            ),
            "",
            f"`{origin.command}`, {origin.date}; results file {origin.sha256[:16]}.",
            "",
        ]
    told = {one.workload for one in facts.speeds}
    return lines + [
        f"{name}: {text}" for name, text in sorted(facts.vendor.workloads.items()) if name in told
    ]


def _usage(facts: Facts) -> str:
    name = facts.vendor.product.package_name
    kind = facts.recording.batch_type
    return f"""# Usage

Input and output are JSON in OpenAI's chat form; `samples/` holds real ones.

| | real-time | batch |
|---|---|---|
| input | `application/json`: one request | `{kind}`: one request a line |
| output | `application/json`, or `text/event-stream` with `"stream": true` | one answer a line, in order |
| sample | `{samples.REALTIME_INPUT}`, `{samples.REALTIME_OUTPUT}`, `{samples.STREAM_OUTPUT}` | \
`{samples.BATCH_INPUT}`, `{samples.BATCH_OUTPUT}` |

| field | meaning |
|---|---|
| `messages` | list of `role` (`system`, `user`, `assistant`) and `content` (text); required |
| `max_tokens` | longest answer |
| `temperature`, `top_p`, `seed` | sampling; temperature 0 always takes the most likely token |
| `stop` | texts that end the answer |
| `stream`, `stream_options` | parts as they are made; `{{"include_usage": true}}` adds a last count |

A field that is not known is refused by name.

## Limits

- A whole answer has 60 s and 6 MB, both the platform's. Long answers, also of models that reason first, break
  at 60 s: stream them, or use an asynchronous endpoint (up to an hour, input up to 1 GB in S3).
- A batch record has {BATCH_PAYLOAD_MB} MB; up to 100 MB and 60 minutes are the platform's limits.
- One line of a batch is one request, {BATCH_CALLS} at a time.
- The container has no network: nothing is downloaded, nothing is sent.

## Deploy and call

`notebook.ipynb` does all of this with boto3: model, endpoint, call, stream, batch, clean-up.

```sh
aws sagemaker create-model --model-name {name} --enable-network-isolation --execution-role-arn ROLE \\
  --primary-container ModelPackageName=ARN          # the ARN of your region is in arn_map.json
aws sagemaker-runtime invoke-endpoint --endpoint-name {name} --content-type application/json \\
  --body fileb://{samples.REALTIME_INPUT} answer.json
```
"""


def _instances(facts: Facts) -> str:
    given, cuda = facts.vendor.instances, facts.vendor.image.cuda
    real, batch = set(given.realtime), set(given.batch)
    rows = [
        f"| `{name}` | {ENDPOINT[name].gpus} | {ENDPOINT[name].gpu_memory_gib} | "
        f"{_mark(name, real, given.recommended_realtime)} | {_mark(name, batch, given.recommended_batch)} |"
        for name in ENDPOINT
        if name in real | batch
    ]
    lines = [
        "# Instance types",
        "",
        "| type | GPUs | GPU memory, GiB | real-time | batch |",
        "|---|---|---|---|---|",
    ]
    lines += [*rows, ""]
    if cuda == "none":
        return "\n".join([*lines, "The image computes on the CPU."])
    return "\n".join(
        [
            *lines,
            f"The image is built for CUDA {cuda}. Endpoints: set `InferenceAmiVersion` to "
            f"`{host_image(cuda)}` or later. "
            f"Batch runs on `{BATCH_HOST_IMAGE}` (driver 535, CUDA 12.2) and no other.",
        ]
    )


def _mark(name: str, among: set[str], recommended: str) -> str:
    return "recommended" if name == recommended else "yes" if name in among else ""


def _pricing(facts: Facts) -> str:
    price = facts.vendor.pricing
    lines = ["# Pricing", ""]
    if price.kind is Pricing.INFERENCE:
        lines += [
            f"Per inference: dimension `{METERING_DIMENSION}`, one unit is {price.unit}. "
            "Answers that fail are not counted. A stream is counted before its first byte.",
            "Batch is billed by the hour, as AWS does for every product.",
        ]
    else:
        lines += ["By the hour and instance type, real-time and batch apart. There is no metering dimension."]
    if price.trial_days is not None:
        lines += [f"Free trial: {price.trial_days} days."]
    return "\n".join(lines)


def _support(facts: Facts) -> str:
    held = facts.vendor.support
    return f"# Support\n\n{held.contact}, {held.hours}"


def _refund(facts: Facts) -> str:
    return f"# Refunds\n\n{facts.vendor.support.refund.strip()}"


def _notes(facts: Facts) -> str:
    product, model = facts.vendor.product, facts.model
    return (
        f"# {product.version}\n\n{product.version_notes.strip()}\n\nSealed package {model.name} "
        f"{model.version}, {model.sealed_bytes:,} bytes, content {model.content_sha256}."
    )


def _terms(facts: Facts) -> str:
    if facts.vendor.eula == STANDARD_CONTRACT:
        return "# Licence terms\n\nThe Standard Contract for AWS Marketplace."
    return facts.terms


def _arns(facts: Facts) -> str:
    rows = [f"| {region} | `{arn}` |" for region, arn in arn_map(facts.vendor).items()]
    return "\n".join(["# The package by region", "", "| region | ARN |", "|---|---|", *rows])


PAGES: Final[dict[str, Callable[[Facts], str]]] = {
    "description.md": _description,
    "usage.md": _usage,
    "instances.md": _instances,
    "pricing.md": _pricing,
    "support.md": _support,
    "refund.md": _refund,
    "version_notes.md": _notes,
    "EULA.md": _terms,
    "regions.md": _arns,
}
