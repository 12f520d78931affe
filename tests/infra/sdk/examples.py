"""`PYTHON -m tests.infra.sdk.examples`, with the SDK's Python: runs every example, prints one JSON object.

Owns: what the stand-in platform adds for the SDK (it describes what it has made), what counts as passed.
Must not know: how its environment was made.
Invariant: no request leaves the machine; a known fault of the SDK that is gone fails the run, so that it is
noticed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import boto3

from infra.emulator import Emulator
from infra.marketplace.rehearsal import ACCOUNT, MADE, Platform
from tests.infra.marketplace import making

REGION = "us-east-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/strongroom"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/strongroom@sha256:{'0' * 64}"
PACKAGE = f"arn:aws:sagemaker:{REGION}:865070037744:model-package/strongroom-example-chat-1-0-0"
BODY = json.dumps({"messages": [{"role": "user", "content": "capital?"}], "max_tokens": 8})
NAME = "sdk"
Answer = dict[str, Any]


class SdkPlatform(Platform):
    """The stand-in, with what the SDK asks after each creation, and asynchronous calls."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        told = {"Model": {}, "EndpointConfig": {}, "Endpoint": {"EndpointStatus": "InService"}}
        jobs = {"TransformJob": {"TransformJobStatus": "Completed"}}
        for kind, fields in (told | jobs).items():
            self.answers[f"sagemaker.Describe{kind}"] = self._describes(kind, fields)
        self.answers["sagemaker-runtime.InvokeEndpointAsync"] = SdkPlatform.later

    @staticmethod
    def _describes(kind: str, fields: Answer) -> Callable[[Platform, Answer], Answer]:
        def describe(platform: Platform, request: Answer) -> Answer:
            name = request[f"{kind}Name"]
            arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind.lower()}/{name}"
            held = {key: value for key, value in platform.need(kind, name).items() if key != "Tags"}
            times = {"CreationTime": MADE, "LastModifiedTime": MADE}
            return {**held, f"{kind}Arn": arn, **times, **fields}

        return describe

    def later(self, request: Answer) -> Answer:
        """Answer at once into S3, as the platform does in its time."""
        config = self.need(
            "EndpointConfig", self.need("Endpoint", request["EndpointName"])["EndpointConfigName"]
        )
        out = config["AsyncInferenceConfig"]["OutputConfig"]["S3OutputPath"].rstrip("/") + "/1.out"
        self.store(out, self.invoke(self.load(request["InputLocation"]), "application/json"))
        return {"InferenceId": "1", "OutputLocation": out}


def run() -> list[Answer]:
    """Return a row an example: what it did, whether it passed, what is worth knowing."""
    began = time.monotonic()
    from infra.examples import sdk_v3

    rows = [row("import", True, f"{time.monotonic() - began:.1f} s (boto3 apart)")]
    with making.server(lines=False) as server, Emulator(server.address, NAME, strict=True) as emulator:
        os.environ["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"] = emulator.url
        keys = {key: value for key, value in emulator.boto3_arguments().items() if key != "endpoint_url"}
        session = boto3.Session(**keys)
        platform = SdkPlatform(server.address)
        platform.attach(session)
        account = sdk_v3.Account(session, ROLE, ["subnet-0", "subnet-1"], ["sg-0"])
        for title, example in EXAMPLES.items():
            platform.clear()
            try:
                rows.append(row(title, True, example(sdk_v3, account, platform, emulator)))
            except Exception as error:  # noqa: BLE001  a row says what an example ended with
                rows.append(row(title, False, f"{type(error).__name__}: {getattr(error, 'message', error)}"))
    return rows


def from_image(sdk: Any, account: Any, platform: Any, _: Any) -> str:
    sdk.model_from_image(account, NAME, IMAGE, "s3://bucket/model/v1/")
    made = sdk.endpoint(account, NAME, NAME)
    assert b"Paris" in sdk.ask(made, account, BODY)
    assert platform.need("Model", NAME)["EnableNetworkIsolation"] is True
    return "made, in service, answered"


def from_package(sdk: Any, account: Any, platform: Any, _: Any) -> str:
    sdk.model_from_package(account, NAME, PACKAGE)
    assert b"Paris" in sdk.ask(sdk.endpoint(account, NAME, NAME), account, BODY)
    assert platform.need("Model", NAME)["PrimaryContainer"] == {"ModelPackageName": PACKAGE}
    return "made, in service, answered"


def asynchronous(sdk: Any, account: Any, platform: Any, _: Any) -> str:
    sdk.model_from_image(account, NAME, IMAGE, "s3://bucket/model/v1/")
    made = sdk.endpoint(account, NAME, NAME, async_output="s3://bucket/out/")
    platform.store("s3://bucket/in/1.json", BODY.encode())
    assert b"Paris" in platform.load(sdk.ask_later(made, account, "s3://bucket/in/1.json"))
    return "answer in S3; the SDK has no `Filename` and no inline body"


def transform(sdk: Any, account: Any, platform: Any, _: Any) -> str:
    sdk.model_from_image(account, NAME, IMAGE, "s3://bucket/model/v1/")
    platform.store("s3://bucket/in/a.jsonl", (BODY + "\n").encode() * 3)
    sdk.batch(account, NAME, NAME, "s3://bucket/in/", "s3://bucket/out")
    assert len(platform.load("s3://bucket/out/a.jsonl.out").splitlines()) == 3
    return "3 lines in, 3 out"


def stream_is_broken(sdk: Any, account: Any, platform: Any, _: Any) -> str:
    sdk.model_from_image(account, NAME, IMAGE, "s3://bucket/model/v1/")
    made = sdk.endpoint(account, NAME, NAME)
    streamed = json.dumps({**json.loads(BODY), "stream": True})
    try:
        made.invoke_with_response_stream(
            body=streamed, content_type="application/json", session=account.session, region=REGION
        )
    except AttributeError as error:
        return f"the SDK's own fault stands: AttributeError, {error}"
    raise AssertionError("the SDK streams now: correct the page and add an example")


def token(_sdk: Any, _account: Any, _platform: Any, emulator: Any) -> str:
    import urllib.request

    from botocore.credentials import Credentials
    from sagemaker.core.token_generator import generate_token

    keys = emulator.boto3_arguments()
    provider = Provider(Credentials(keys["aws_access_key_id"], keys["aws_secret_access_key"]))
    made = generate_token(region=REGION, aws_credentials_provider=provider)
    request = urllib.request.Request(
        f"{emulator.openai_base_url()}/chat/completions",
        data=BODY.encode(),
        headers={"Authorization": f"Bearer {made}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        assert b"Paris" in reply.read()
    return "accepted with its signature verified"


class Provider:
    """Credentials, as the token generator asks for them."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def load(self) -> Any:
        """Return them."""
        return self._credentials


EXAMPLES: dict[str, Callable[[Any, Any, Any, Any], str]] = {
    "endpoint from image": from_image,
    "endpoint from model package": from_package,
    "asynchronous endpoint": asynchronous,
    "batch transform": transform,
    "stream": stream_is_broken,
    "bearer token": token,
}


def row(title: str, ok: bool, told: str) -> Answer:
    return {"example": title, "ok": ok, "told": told}


def main() -> int:
    """Print rows and versions; 1 when one failed."""
    rows = run()
    names = ("sagemaker-core", "boto3", "pydantic")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    print(json.dumps({"rows": rows, "versions": versions}))
    return 0 if all(one["ok"] for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
