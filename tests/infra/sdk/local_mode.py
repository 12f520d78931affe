"""SageMaker local mode with the real image: `PYTHON -m tests.infra.sdk.local_mode IMAGE MODEL_DIR`.

Owns: the calls of local mode, cleaning up after it. Must not know: how the image was built.
Invariant: dummy keys only, since local mode hands the caller's to the container; no container of a run stays.

Needs the SDK, Docker and its compose (`docker compose`, or `docker-compose` 1.29). It binds port 8080.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "dummy", "AWS_SECRET_ACCESS_KEY": "dummy", "AWS_DEFAULT_REGION": "us-east-1"}
CHAT = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 16,
    "temperature": 0,
}
TYPE = "application/json"


def containers() -> set[str]:
    """Return the ids of all containers."""
    command = ["docker", "ps", "-aq", "--no-trunc"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@contextlib.contextmanager
def nothing_stays(image: str) -> Iterator[None]:
    """Remove what local mode leaves of `image`: it forgets a container now and then."""
    before = containers()
    try:
        yield
    finally:
        command = ["docker", "ps", "-aq", "--no-trunc", "--filter", f"ancestor={image}"]
        of_image = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        left = sorted((containers() - before) & of_image)
        if left:
            subprocess.run(["docker", "rm", "-f", *left], capture_output=True, check=False)


def client(folder: Path) -> Any:
    """Return a local session."""
    from sagemaker.core.local import LocalSession

    local = LocalSession(default_bucket="unused")
    settings = {"local_code": True, "container_root": str(folder)}
    local.config = {"local": settings}
    return local


def endpoint(local: Any, image: str, model: Path) -> str:
    """Make a model and an endpoint, call it; return the answer."""
    container = {
        "Image": image,
        "ModelDataUrl": f"file://{model}",
        "Environment": {"STRONGROOM_WORKERS": "1"},
    }
    sagemaker, runtime = local.sagemaker_client, local.sagemaker_runtime_client
    sagemaker.create_model(ModelName="m", PrimaryContainer=container)
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": "m",
        "InitialInstanceCount": 1,
        "InstanceType": "local",
    }
    sagemaker.create_endpoint_config("c", [variant])
    sagemaker.create_endpoint("e", "c")
    try:
        answer = runtime.invoke_endpoint(Body=json.dumps(CHAT), EndpointName="e", ContentType=TYPE)
        return str(json.loads(answer["Body"].read())["choices"][0]["message"]["content"])
    finally:
        sagemaker.delete_endpoint("e")


def batch(local: Any, folder: Path) -> list[str]:
    """Run a batch of two lines with the model that `endpoint` made; return the answers."""
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    lines = [json.dumps(CHAT), json.dumps({**CHAT, "messages": [{"role": "user", "content": "Say hello."}]})]
    (folder / "in" / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"file://{folder}/in"}}
    local.sagemaker_client.create_transform_job(
        TransformJobName="t",
        ModelName="m",
        TransformInput={"DataSource": source, "ContentType": TYPE, "SplitType": "Line"},
        TransformOutput={"S3OutputPath": f"file://{folder}/out", "Accept": TYPE, "AssembleWith": "Line"},
        TransformResources={"InstanceType": "local", "InstanceCount": 1},
        BatchStrategy="SingleRecord",
        MaxPayloadInMB=6,
    )
    text = next((folder / "out").rglob("*.out")).read_text(encoding="utf-8")
    return [
        json.loads(line)["choices"][0]["message"]["content"] for line in text.splitlines() if line.strip()
    ]


def main() -> int:
    """Print one JSON object with what both did."""
    image, model = sys.argv[1], Path(sys.argv[2]).resolve()
    os.environ.update(KEYS)
    rows: list[dict[str, Any]] = []
    with nothing_stays(image), tempfile.TemporaryDirectory() as name:
        local = client(Path(name))
        for title, run in (
            ("local mode: endpoint", lambda: endpoint(local, image, model)),
            ("local mode: batch", lambda: batch(local, Path(name))),
        ):
            began = time.monotonic()
            try:
                told = run()
                ok = "Paris" in str(told) and (isinstance(told, str) or len(told) == 2)
            except Exception as error:  # noqa: BLE001  a row says what a run ended with
                ok, told = False, f"{type(error).__name__}: {error}"
            row = {"example": title, "ok": ok, "told": f"{time.monotonic() - began:.0f} s: {told}"}
            rows.append(row)
    print(json.dumps({"rows": rows}))
    return 0 if all(one["ok"] for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
