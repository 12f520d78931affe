"""Running the sample notebook: its code, in order, against the emulator and a stand-in for the control plane.

Owns: the few operations of SageMaker, S3 and STS that the notebook calls, the executor, the child process it
runs in. Must not know: what the notebook says.
Invariant: no request leaves the machine; each is one that the service model and our own rules accept; an
operation that is not known here fails the run; the child has none of the caller's AWS_* variables.

A cell is run as a kernel would run it: one namespace, what it prints is its output. A kernel itself
(ipykernel, with its sockets and twenty packages) would add nothing that these cells use.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from infra.marketplace.notebook import Cell
from infra.report import CommandError, ExitCode

RUN_S: Final = 900
CALL_S: Final = 120.0
ACCOUNT: Final = "000000000000"
PASSED_ON: Final = frozenset({"sagemaker-runtime"})
MADE: Final = datetime(2026, 1, 1, tzinfo=UTC)
Answer = dict[str, Any]


def run(cells: tuple[Cell, ...], server: str, endpoint: str) -> list[str]:
    """Return what each code cell printed with the server at HOST:PORT behind it; raises CommandError."""
    code = [cell.source for cell in cells if cell.kind == "code"]
    order = {"cells": code, "server": server, "endpoint": endpoint}
    base = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "infra.marketplace.rehearsal"],
            input=json.dumps(order),
            env=base,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise _failed(f"it did not end within {RUN_S} s") from error
    if done.returncode or "outputs" not in answer:
        raise _failed(f"cell {answer.get('cell', '?')} raised {answer.get('raised', 'an error')}")
    return [str(text) for text in answer["outputs"]]


class Platform:
    """What AWS would answer, as far as the notebook asks; a batch job calls the server at `address`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._objects: dict[tuple[str, str], bytes] = {}
        self._made: dict[tuple[str, str], Answer] = {}
        self._params: Answer = {}
        self.calls: list[str] = []
        self.answers = dict(ANSWERS)

    def attach(self, session: Any) -> None:
        """Answer every client that `session` makes from now on."""
        from infra.deploy.aws import check_request

        session.events.register("before-parameter-build", check_request)
        session.events.register("before-parameter-build", self._note)
        session.events.register("before-call", self._answer)

    def _note(self, params: Answer, **_: Any) -> None:
        self._params = params

    def _answer(self, model: Any, **_: Any) -> tuple[Any, Answer] | None:
        service = model.service_model.service_name
        act = self.answers.get(f"{service}.{model.name}")
        if act is None and service in PASSED_ON:
            return None
        self.calls.append(model.name)
        if act is None:
            raise CommandError(ExitCode.CHECK_FAILED, "unknown_call", f"`{model.name}` has no stand-in")
        return _Http(), {"ResponseMetadata": {"HTTPStatusCode": 200}, **act(self, self._params)}

    def create(self, kind: str, request: Answer) -> Answer:
        name = request[f"{kind}Name"]
        if (kind, name) in self._made:
            raise CommandError(ExitCode.CHECK_FAILED, "exists", f"the {kind} `{name}` exists")
        self._made[kind, name] = request
        return {f"{kind}Arn": f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:{kind.lower()}/{name}"}

    def need(self, kind: str, name: str) -> Answer:
        if (kind, name) not in self._made:
            raise CommandError(ExitCode.CHECK_FAILED, "absent", f"there is no {kind} `{name}`")
        return self._made[kind, name]

    def delete(self, kind: str, request: Answer) -> Answer:
        self.need(kind, request[f"{kind}Name"])
        del self._made[kind, request[f"{kind}Name"]]
        return {}

    def create_config(self, request: Answer) -> Answer:
        for variant in request["ProductionVariants"]:
            self.need("Model", variant["ModelName"])
        return self.create("EndpointConfig", request)

    def create_endpoint(self, request: Answer) -> Answer:
        self.need("EndpointConfig", request["EndpointConfigName"])
        return self.create("Endpoint", request)

    def describe_endpoint(self, request: Answer) -> Answer:
        self.need("Endpoint", request["EndpointName"])
        return {"EndpointName": request["EndpointName"], "EndpointStatus": "InService", "CreationTime": MADE}

    def describe_package(self, request: Answer) -> Answer:
        return {"ModelPackageArn": request["ModelPackageName"], "ModelPackageStatus": "Completed"}

    def put(self, request: Answer) -> Answer:
        body = request["Body"]  # the SDK makes a file of bytes
        self._objects[request["Bucket"], request["Key"]] = body if isinstance(body, bytes) else body.read()
        return {}

    def get(self, request: Answer) -> Answer:
        return {"Body": io.BytesIO(self._objects[request["Bucket"], request["Key"]])}

    def transform(self, request: Answer) -> Answer:
        """Run the job at once: each line of each object is one call, as SingleRecord says."""
        self.need("Model", request["ModelName"])
        read, write = request["TransformInput"], request["TransformOutput"]
        bucket, prefix = _split(read["DataSource"]["S3DataSource"]["S3Uri"])
        out_bucket, out = _split(write["S3OutputPath"])
        for (held, key), data in list(self._objects.items()):
            if held == bucket and key.startswith(prefix):
                answers = [self.invoke(line, read["ContentType"]) for line in data.splitlines() if line]
                joined = b"".join(answer.strip() + b"\n" for answer in answers)
                self._objects[out_bucket, f"{out.rstrip('/')}/{key[len(prefix) :]}.out"] = joined
        return self.create("TransformJob", request)

    def describe_job(self, request: Answer) -> Answer:
        held = self.need("TransformJob", request["TransformJobName"])
        return {"TransformJobStatus": "Completed", "TransformJobName": held["TransformJobName"]}

    def clear(self) -> None:
        """Forget everything that was made."""
        self._made.clear()
        self._objects.clear()

    def store(self, uri: str, data: bytes) -> None:
        """Put an object where `uri` says."""
        self._objects[_split(uri)] = data

    def load(self, uri: str) -> bytes:
        """Return the object at `uri`; raises KeyError."""
        return self._objects[_split(uri)]

    def invoke(self, line: bytes, kind: str) -> bytes:
        """Return the server's answer to one request of a job; raises CommandError for a failure."""
        host, _, port = self._address.rpartition(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=CALL_S)) as connection:
            connection.request("POST", "/invocations", body=line, headers={"Content-Type": kind})
            reply = connection.getresponse()
            data = reply.read()
        if reply.status != 200:
            raise CommandError(ExitCode.CHECK_FAILED, "job_failed", f"a line was answered {reply.status}")
        return data


ANSWERS: Final[dict[str, Callable[[Platform, Answer], Answer]]] = {
    "sts.GetCallerIdentity": lambda _platform, _request: {"Account": ACCOUNT},
    "s3.PutObject": Platform.put,
    "s3.GetObject": Platform.get,
    "sagemaker.DescribeModelPackage": Platform.describe_package,
    "sagemaker.CreateModel": lambda platform, request: platform.create("Model", request),
    "sagemaker.CreateEndpointConfig": Platform.create_config,
    "sagemaker.CreateEndpoint": Platform.create_endpoint,
    "sagemaker.DescribeEndpoint": Platform.describe_endpoint,
    "sagemaker.CreateTransformJob": Platform.transform,
    "sagemaker.DescribeTransformJob": Platform.describe_job,
    "sagemaker.DeleteEndpoint": lambda platform, request: platform.delete("Endpoint", request),
    "sagemaker.DeleteEndpointConfig": lambda platform, request: platform.delete("EndpointConfig", request),
    "sagemaker.DeleteModel": lambda platform, request: platform.delete("Model", request),
}


class _Http:
    """The part of an HTTP answer that the SDK looks at when one is given to it."""

    status_code = 200
    headers: Final[dict[str, str]] = {}


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def execute(code: list[str]) -> list[str]:
    """Return what each piece of code printed; raises CellFailed, naming the piece that raised."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs: list[str] = []
    for number, source in enumerate(code, 1):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(source, f"<cell {number}>", "exec"), namespace)  # noqa: S102  our own cells
        except Exception as error:
            raise CellFailed(number, error) from error
        outputs.append(printed.getvalue())
    return outputs


class CellFailed(Exception):
    """A cell raised; `raised` names the exception and, of our own, its message."""

    def __init__(self, cell: int, error: Exception) -> None:
        super().__init__(cell)
        self.cell = cell
        self.raised = error.message if isinstance(error, CommandError) else type(error).__name__


def main() -> int:
    """Run the cells named on stdin; the last line of stdout is one JSON object."""
    import boto3

    from infra.emulator import LOCAL_KEYS, LOCAL_REGION, Emulator

    order = json.loads(sys.stdin.read())
    with Emulator(order["server"], order["endpoint"], strict=True) as emulator:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": LOCAL_KEYS.access_key_id,
            "AWS_SECRET_ACCESS_KEY": LOCAL_KEYS.secret_access_key,
            "AWS_DEFAULT_REGION": LOCAL_REGION,
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": emulator.url,
        }
        boto3.setup_default_session()
        Platform(order["server"]).attach(boto3.DEFAULT_SESSION)
        try:
            answer: Answer = {"outputs": execute(order["cells"])}
        except CellFailed as failed:
            answer = {"cell": failed.cell, "raised": failed.raised}
    print(json.dumps(answer))
    return 0 if "outputs" in answer else 1


def _failed(why: str) -> CommandError:
    hint = "run its cells by hand against `strongroom emulate`"
    return CommandError(ExitCode.CHECK_FAILED, "notebook_failed", f"the notebook does not run: {why}", hint)


if __name__ == "__main__":
    sys.exit(main())
