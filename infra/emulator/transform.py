"""Batch transform: jobs that read inputs from a store, call the container and write one output per input.

Owns: jobs by name, their state, concurrency, retries, which parameters hold. Must not know: HTTP routes.
Invariant: a job ends as Completed, Failed or Stopped; an input one of whose payloads failed has no output and
    fails the job, and the other inputs keep theirs.

Parameters: the job's, else those of `GET /execution-parameters`, else 1 transform, MultiRecord, 6 MB.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from infra.emulator.calling import Stop, call
from infra.emulator.records import MB, BadRecords, Shape, check_shape, output, payloads, request_body
from infra.emulator.stores import ObjectMissing, Store, join, parse
from infra.emulator.upstream import Address, ClientGone, Clock, ExchangeFailed

TIMEOUT_S: Final = 600
RETRIES: Final = 3
PAYLOAD_MB: Final = 100  # most of one payload, and of all that run at once
PARAMETERS_S: Final = 10.0
_STRATEGIES: Final = {"MULTI_RECORD": "MultiRecord", "SINGLE_RECORD": "SingleRecord"}
_ENDED: Final = ("Completed", "Failed", "Stopped")


class BadJob(Exception):
    """A job the platform would not take; the message says why."""


class FileFailed(Exception):
    """One input of a job failed; the message says why, without its content."""


@dataclass(slots=True)
class Job:
    """A job and how far it is. `request` is that of CreateTransformJob."""

    request: dict[str, Any]
    address: Address
    status: str = "InProgress"
    reason: str | None = None
    created_s: float = field(default_factory=time.time)
    ended_s: float | None = None
    stop: Stop = field(default_factory=Stop)
    thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return str(self.request["TransformJobName"])


class Transforms:
    """The jobs of one emulator; safe to use from any thread."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def start(self, request: dict[str, Any], address: Address) -> None:
        """Start a job; raises BadJob for a taken name or what is not emulated."""
        self._check(request)
        with self._lock:
            if request["TransformJobName"] in self._jobs:
                raise BadJob("Job name must be unique within an AWS account and region")
            job = Job(request, address)
            self._jobs[job.name] = job
        job.thread = threading.Thread(target=self._run, args=(job,), name=f"transform {job.name}")
        job.thread.start()

    def find(self, name: str) -> Job | None:
        """Return the job called `name`."""
        with self._lock:
            return self._jobs.get(name)

    def stop(self, job: Job) -> None:
        """Ask a running job to end."""
        if job.status == "InProgress":
            job.status = "Stopping"
            job.stop.end()

    def close(self) -> None:
        """End every job and wait for it."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop.end()
        for job in jobs:
            if job.thread is not None:
                job.thread.join()

    def _check(self, request: dict[str, Any]) -> None:
        source = request["TransformInput"]
        kind = source["DataSource"]["S3DataSource"]["S3DataType"]
        if kind not in ("S3Prefix", "ManifestFile"):
            raise BadJob(f"S3DataType {kind} is not emulated")
        if "DataCaptureConfig" in request:
            raise BadJob("DataCaptureConfig is not emulated")
        try:
            check_shape(_shape(request, {}))
        except BadRecords as error:
            raise BadJob(str(error)) from error

    def _run(self, job: Job) -> None:
        failures: list[str] = []
        try:
            told = self._told(job)
            shape, together = _shape(job.request, told), _together(job.request, told)
            if together * max(1, shape.payload_bytes) > PAYLOAD_MB * MB:
                raise FileFailed(f"MaxConcurrentTransforms times MaxPayloadInMB is above {PAYLOAD_MB}")
            inputs = self._inputs(job)
            if not inputs:
                raise FileFailed("No S3 objects found under the given S3Uri")
            with ThreadPoolExecutor(together, thread_name_prefix="transform") as pool:
                for location, relative in inputs:
                    try:
                        self._file(job, shape, pool, location, relative)
                    except (FileFailed, BadRecords, ObjectMissing) as error:
                        failures.append(f"{relative}: {error}")
        except ClientGone:
            self._end(job, "Stopped")
        except (FileFailed, ObjectMissing) as error:
            self._end(job, "Failed", str(error))
        else:
            self._end(job, "Failed" if failures else "Completed", "; ".join(failures)[:1024] or None)

    def _end(self, job: Job, status: str, reason: str | None = None) -> None:
        job.reason, job.ended_s, job.status = reason, time.time(), status
        job.stop.close()

    def _told(self, job: Job) -> dict[str, Any]:
        """Return the container's own parameters; a container without the route has none."""
        try:
            answer = call(
                job.address,
                [],
                b"",
                job.stop,
                PARAMETERS_S,
                self._clock,
                method="GET",
                path="/execution-parameters",
            )
            told = json.loads(answer.body) if answer.good else {}
        except ClientGone:
            raise
        except (ExchangeFailed, ValueError) as error:
            raise FileFailed("The container did not answer /execution-parameters") from error
        return told if isinstance(told, dict) else {}

    def _inputs(self, job: Job) -> list[tuple[str, str]]:
        """Return (location, name under the output) of every input."""
        source = job.request["TransformInput"]["DataSource"]["S3DataSource"]
        uri = str(source["S3Uri"])
        if source["S3DataType"] == "S3Prefix":
            return [(location, _relative(location, uri)) for location in self._store.list(uri)]
        try:
            first, *names = json.loads(self._store.read(uri))
            prefix = first["prefix"]
            return [(prefix + name, name) for name in names]
        except (ValueError, TypeError, KeyError) as error:
            raise FileFailed("The manifest is not a prefix followed by names") from error

    def _file(self, job: Job, shape: Shape, pool: ThreadPoolExecutor, location: str, relative: str) -> None:
        data = self._store.read(location)
        if job.request["TransformInput"].get("CompressionType") == "Gzip":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError) as error:
                raise FileFailed("the input is not gzip") from error
        futures = [pool.submit(self._payload, job, shape, each) for each in payloads(data, shape)]
        try:
            made = b"".join(future.result() for future in futures)
        finally:
            for future in futures:
                future.cancel()
        kind = job.request["TransformOutput"].get("Accept", "application/octet-stream")
        target = join(job.request["TransformOutput"]["S3OutputPath"], f"{relative}.out")
        self._store.write(target, made, kind)

    def _payload(self, job: Job, shape: Shape, records: list[bytes]) -> bytes:
        client = job.request.get("ModelClientConfig", {})
        timeout_s = client.get("InvocationsTimeoutInSeconds", TIMEOUT_S)
        body = request_body(records, shape)
        headers = []
        if "ContentType" in job.request["TransformInput"]:
            headers.append(("Content-Type", job.request["TransformInput"]["ContentType"]))
        if "Accept" in job.request["TransformOutput"]:
            headers.append(("Accept", job.request["TransformOutput"]["Accept"]))
        failure = ""
        for _ in range(1 + client.get("InvocationsMaxRetries", RETRIES)):
            try:
                answer = call(job.address, headers, body, job.stop, timeout_s, self._clock)
            except ClientGone:
                raise
            except ExchangeFailed as error:
                failure = f"the container gave no whole answer ({type(error).__name__})"
                continue
            if answer.good:
                return output(records, answer.body, shape)
            failure = f"the container answered {answer.status}"
            if answer.status < 500 and answer.status != 429:
                break  # it would say the same again
        raise FileFailed(failure)


def describe(job: Job, region: str, account: str) -> dict[str, Any]:
    """Return what DescribeTransformJob says of `job`."""
    request = job.request
    told: dict[str, Any] = {
        **{name: value for name, value in request.items() if name != "Tags"},
        "TransformJobArn": arn(request["TransformJobName"], region, account),
        "TransformJobStatus": job.status,
        "CreationTime": job.created_s,
        "TransformStartTime": job.created_s,
    }
    if job.ended_s is not None and job.status in _ENDED:
        told["TransformEndTime"] = job.ended_s
    if job.reason is not None:
        told["FailureReason"] = job.reason
    return told


def arn(name: str, region: str, account: str) -> str:
    """Return the name of a job as the platform writes it."""
    return f"arn:aws:sagemaker:{region}:{account}:transform-job/{name}"


def _shape(request: dict[str, Any], told: dict[str, Any]) -> Shape:
    processing = request.get("DataProcessing", {})
    strategy = _STRATEGIES.get(told.get("BatchStrategy", ""), "MultiRecord")
    payload_mb = request.get("MaxPayloadInMB", told.get("MaxPayloadInMB", 6))
    return Shape(
        split=request["TransformInput"].get("SplitType", "None"),
        strategy=request.get("BatchStrategy", strategy),
        payload_bytes=payload_mb * MB,
        assemble=request["TransformOutput"].get("AssembleWith", "None"),
        input_filter=processing.get("InputFilter", "$"),
        output_filter=processing.get("OutputFilter", "$"),
        join=processing.get("JoinSource", "None"),
    )


def _together(request: dict[str, Any], told: dict[str, Any]) -> int:
    return max(1, int(request.get("MaxConcurrentTransforms") or told.get("MaxConcurrentTransforms", 1)))


def _relative(location: str, prefix: str) -> str:
    """Return an input's name under the output: its key without the prefix's last folder."""
    key, start = parse(location)[1], parse(prefix)[1]
    return key[start.rfind("/") + 1 :]
