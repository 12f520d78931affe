"""The sample notebook: what a buyer runs, from the subscription to the clean-up.

Owns: its cells, its form (nbformat 4.5), what an executed one may hold. Must not know: who executes it.
Invariant: its cells follow from the product alone; an executed notebook that passes holds no account, no key
and no trace of the machine it ran on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from infra.marketplace.request import arn_map
from infra.marketplace.vendor import Vendor

NAME: Final = "notebook.ipynb"
# An account, a key, a bearer token, a home or temporary folder, a loopback address with its port.
TRACES: Final = re.compile(
    r"\b[0-9]{12}\b|\b(AKIA|ASIA)[A-Z0-9]{8,}|sagemaker-api-key-|/(home|root|tmp|Users|work)/|127\.0\.0\.1|localhost:"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: prose, or code that is run."""

    kind: str  # markdown, code
    source: str


def cells(vendor: Vendor, batch_type: str) -> tuple[Cell, ...]:
    """Return the notebook's cells for a product."""
    product, prompts = vendor.product, vendor.samples.prompts
    arns = ",\n".join(f'    "{region}": "{arn}"' for region, arn in arn_map(vendor).items())
    values = {
        "TITLE": product.title,
        "SHORT": product.short_description,
        "ARNS": arns,
        "NAME": product.package_name,
        "TYPE": vendor.instances.recommended_realtime,
        "BATCH_TYPE": vendor.instances.recommended_batch,
        "PROMPT": json.dumps(prompts[0], ensure_ascii=False),
        "PROMPTS": json.dumps(list(prompts), ensure_ascii=False),
        "TOKENS": str(vendor.samples.max_tokens),
        "CONTENT": batch_type,
    }
    return tuple(Cell(kind, _filled(text, values)) for kind, text in TEMPLATE)


def document(made: tuple[Cell, ...], outputs: list[str] | None = None) -> dict[str, Any]:
    """Return the notebook; `outputs` holds what each code cell printed, in order."""
    texts = iter(outputs or [])
    shown: list[dict[str, Any]] = []
    count = 0
    for number, cell in enumerate(made, 1):
        lines = cell.source.splitlines(keepends=True)
        entry: dict[str, Any] = {
            "cell_type": cell.kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": lines,
        }
        if cell.kind == "code":
            count += 1
            printed = next(texts, "") if outputs is not None else ""
            stream = {"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}
            entry["outputs"] = [stream] if printed else []
            entry["execution_count"] = count if outputs is not None else None
        shown.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": shown, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def text(made: dict[str, Any]) -> str:
    """Return a notebook's file, always in the same form."""
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def faults(data: bytes, made: tuple[Cell, ...]) -> Iterator[str]:
    """Yield what is wrong with an executed notebook of these cells."""
    try:
        held = json.loads(data)
        found = [(str(cell["cell_type"]), "".join(cell["source"])) for cell in held["cells"]]
        ran = [cell for cell in held["cells"] if cell["cell_type"] == "code"]
        counts = [cell["execution_count"] for cell in ran]
        outputs = [output for cell in ran for output in cell["outputs"]]
        printed = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    except (ValueError, KeyError, TypeError):
        yield f"`{NAME}` is no notebook"
        return
    if found != [(cell.kind, cell.source) for cell in made]:
        yield f"`{NAME}` has other cells than the product's"
    if counts != list(range(1, len(counts) + 1)):
        yield f"`{NAME}` was not executed from its first cell to its last"
    if len(printed) != len(outputs):
        yield f"`{NAME}` has an output that is not printed text"
    for trace in {seen[0] for each in printed if (seen := TRACES.search(each))}:
        yield f"`{NAME}` prints `{trace[:4]}...`, which belongs to an account or a machine"


def _filled(source: str, values: dict[str, str]) -> str:
    return re.sub(r"<<(\w+)>>", lambda found: values[found[1]], source.strip("\n"))


TEMPLATE: Final[tuple[tuple[str, str], ...]] = (
    (
        "markdown",
        """
# <<TITLE>>

<<SHORT>>

This notebook deploys the product into your account, calls it in every way, runs a batch and takes all of it
away again. Running it costs what the instances cost while they run. It asks for none of your data.

Needed: a subscription to the product, a role that SageMaker may assume with access to the bucket below, and
quota for `<<TYPE>>`.
""",
    ),
    (
        "code",
        """
import json

import boto3

ROLE_NAME = "strongroom-execution"  # your execution role
BUCKET = "your-bucket"  # for the batch
VPC = None  # {"Subnets": [...], "SecurityGroupIds": [...]} of a network without a way out
NAME = "<<NAME>>"
INSTANCE_TYPE = "<<TYPE>>"

sagemaker = boto3.client("sagemaker")
runtime = boto3.client("sagemaker-runtime")
s3 = boto3.client("s3")
region = sagemaker.meta.region_name
""",
    ),
    (
        "markdown",
        """
## 1. The package

After subscribing, the package is found under this ARN in your region.
""",
    ),
    (
        "code",
        """
PACKAGES = {
<<ARNS>>,
}
account = boto3.client("sts").get_caller_identity()["Account"]
role = f"arn:aws:iam::{account}:role/{ROLE_NAME}"
package = PACKAGES[region]
state = sagemaker.describe_model_package(ModelPackageName=package)["ModelPackageStatus"]
print("package in", region, "is", state)
""",
    ),
    (
        "markdown",
        """
## 2. Model and endpoint

Network isolation is on: the container can reach nothing, and prompts and answers stay in your account.
""",
    ),
    (
        "code",
        """
model = {
    "ModelName": NAME,
    "ExecutionRoleArn": role,
    "PrimaryContainer": {"ModelPackageName": package},
    "EnableNetworkIsolation": True,
}
sagemaker.create_model(**model | ({"VpcConfig": VPC} if VPC else {}))
sagemaker.create_endpoint_config(
    EndpointConfigName=NAME,
    ProductionVariants=[
        {
            "VariantName": "AllTraffic",
            "ModelName": NAME,
            "InstanceType": INSTANCE_TYPE,
            "InitialInstanceCount": 1,
            "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
            "ModelDataDownloadTimeoutInSeconds": 1800,
        }
    ],
)
sagemaker.create_endpoint(EndpointName=NAME, EndpointConfigName=NAME)
sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=NAME)
print("endpoint is", sagemaker.describe_endpoint(EndpointName=NAME)["EndpointStatus"])
""",
    ),
    ("markdown", "## 3. A whole answer\n\nIt has 60 s, the platform's limit: stream long answers."),
    (
        "code",
        """
def chat(prompt, **fields):
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": <<TOKENS>>, "temperature": 0}
    return json.dumps(body | fields)


answer = runtime.invoke_endpoint(EndpointName=NAME, ContentType="application/json", Body=chat(<<PROMPT>>))
told = json.loads(answer["Body"].read())
print(told["choices"][0]["message"]["content"])
print("tokens:", told["usage"]["prompt_tokens"], "in,", told["usage"]["completion_tokens"], "out")
""",
    ),
    (
        "markdown",
        """
## 4. A stream

Parts end anywhere, so they are joined and split into lines again.
""",
    ),
    (
        "code",
        """
def events(parts):
    held = b""
    for part in parts:
        *lines, held = (held + part["PayloadPart"]["Bytes"]).split(b"\\n")
        for line in lines:
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])


answer = runtime.invoke_endpoint_with_response_stream(
    EndpointName=NAME, ContentType="application/json", Body=chat(<<PROMPT>>, stream=True)
)
for event in events(answer["Body"]):
    print(event["choices"][0]["delta"].get("content", "") if event["choices"] else "", end="", flush=True)
print()
""",
    ),
    (
        "markdown",
        """
## 5. The OpenAI route

Any OpenAI client works with this base URL and a bearer token in place of an API key. The caller needs
`sagemaker:CallWithBearerToken`.
""",
    ),
    (
        "code",
        """
import base64
import urllib.request

from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest


def bearer_token(seconds=900):
    request = AWSRequest("POST", "https://sagemaker.amazonaws.com/", params={"Action": "CallWithBearerToken"})
    keys = boto3.Session().get_credentials().get_frozen_credentials()
    SigV4QueryAuth(keys, "sagemaker", region, expires=seconds).add_auth(request)
    signed = request.url.removeprefix("https://") + "&Version=1"
    return "sagemaker-api-key-" + base64.b64encode(signed.encode()).decode()


base_url = f"{runtime.meta.endpoint_url}/endpoints/{NAME}/openai/v1"
request = urllib.request.Request(
    f"{base_url}/chat/completions",
    data=chat(<<PROMPT>>, model="").encode(),
    headers={"Authorization": f"Bearer {bearer_token()}", "Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as reply:
    print(json.load(reply)["choices"][0]["message"]["content"])
""",
    ),
    (
        "markdown",
        """
## 6. A batch

One request a line; the answers come in the same order.
""",
    ),
    (
        "code",
        """
lines = "".join(chat(prompt) + "\\n" for prompt in <<PROMPTS>>)
s3.put_object(Bucket=BUCKET, Key=f"{NAME}/in/requests.jsonl", Body=lines.encode())
sagemaker.create_transform_job(
    TransformJobName=NAME,
    ModelName=NAME,
    BatchStrategy="SingleRecord",
    TransformInput={
        "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/{NAME}/in/"}},
        "ContentType": "<<CONTENT>>",
        "SplitType": "Line",
    },
    TransformOutput={
        "S3OutputPath": f"s3://{BUCKET}/{NAME}/out",
        "Accept": "<<CONTENT>>",
        "AssembleWith": "Line",
    },
    TransformResources={"InstanceType": "<<BATCH_TYPE>>", "InstanceCount": 1},
)
sagemaker.get_waiter("transform_job_completed_or_stopped").wait(TransformJobName=NAME)
print("job is", sagemaker.describe_transform_job(TransformJobName=NAME)["TransformJobStatus"])
result = s3.get_object(Bucket=BUCKET, Key=f"{NAME}/out/requests.jsonl.out")["Body"].read().decode()
for line in result.splitlines():
    print("-", json.loads(line)["choices"][0]["message"]["content"])
""",
    ),
    (
        "markdown",
        "## 7. Clean up\n\nThe endpoint costs until it is deleted. The bucket keeps the batch's files.",
    ),
    (
        "code",
        """
sagemaker.delete_endpoint(EndpointName=NAME)
sagemaker.delete_endpoint_config(EndpointConfigName=NAME)
sagemaker.delete_model(ModelName=NAME)
print("endpoint, configuration and model are deleted; end the subscription on the Marketplace page")
""",
    ),
)
