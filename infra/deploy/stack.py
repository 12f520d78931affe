"""`strongroom deploy up`, `status`, `invoke`, `logs`, `down`: one stack, made, looked at, called, taken away.

Owns: the calls and the waiting. Must not know: what a template contains.
Invariant: a change is a change set first; what the template retains is not deleted, and it is listed.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from infra.deploy import progress
from infra.deploy.aws import Aws
from infra.deploy.choices import Choices
from infra.report import CommandError, ExitCode, Result
from infra.templates import render

POLL_S: Final = 10.0
UP_S: Final = 3 * 3600.0  # twice the longest provision, download and start-up together
DOWN_S: Final = 3600.0  # network interfaces of a deleted endpoint go last, after many minutes
LOG_LINES: Final = 50
TAKES_CALLS: Final = ("InService", "Updating", "SystemUpdating", "RollingBack")  # the old fleet answers
ENDED: Final = ("_COMPLETE", "_FAILED")
Say = Callable[[str], None]


def up(choices: Choices, aws: Aws, say: Say, poll_s: float = POLL_S) -> Result:
    """Make or update the stack and wait; raises CommandError when AWS takes it back."""
    cloud = aws.client("cloudformation")
    known = describe(aws, choices.stack)
    kind = "UPDATE" if known and known["StackStatus"] != "REVIEW_IN_PROGRESS" else "CREATE"
    name = f"strongroom-{datetime.datetime.now(datetime.UTC):%Y%m%d%H%M%S}"
    cloud.create_change_set(
        StackName=choices.stack,
        ChangeSetName=name,
        ChangeSetType=kind,
        TemplateBody=render.template_text(choices.variant),
        Parameters=choices.parameters(),
        Capabilities=["CAPABILITY_IAM"],
        Tags=[{"Key": "strongroom:template", "Value": choices.variant.name}],
    )
    changes = _changes(cloud, choices.stack, name, poll_s)
    if not changes:
        cloud.delete_change_set(StackName=choices.stack, ChangeSetName=name)
        return {"ok": True, "stack": choices.stack, "changes": [], "status": "unchanged"}
    say(f"{len(changes)} changes")
    cloud.execute_change_set(StackName=choices.stack, ChangeSetName=name)
    final = _wait(choices.stack, aws, say, poll_s, UP_S)
    ok = final["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE")
    made = {"ok": ok, "stack": choices.stack, "status": final["StackStatus"], "changes": changes}
    if not ok:
        made["failures"] = _failures(cloud, choices.stack)
    return made | {"outputs": _outputs(final)}


def _changes(cloud: Any, stack: str, name: str, poll_s: float) -> list[dict[str, str]]:
    """Return what a change set would do, once it is computed; nothing when nothing changes."""
    while True:
        found = cloud.describe_change_set(StackName=stack, ChangeSetName=name)
        if found["Status"] == "FAILED":
            reason = str(found.get("StatusReason", ""))
            if "didn't contain changes" in reason or "No updates" in reason:
                return []
            raise CommandError(ExitCode.AWS_REFUSED, "change_set_failed", reason)
        if found["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
            break
        time.sleep(poll_s)
    return [
        {
            "action": one["ResourceChange"]["Action"],
            "resource": one["ResourceChange"]["LogicalResourceId"],
            "type": one["ResourceChange"]["ResourceType"],
            "replacement": one["ResourceChange"].get("Replacement", "False"),
        }
        for one in found.get("Changes", [])
    ]


def describe(aws: Aws, stack: str) -> dict[str, Any] | None:
    """Return the stack as AWS tells it, None where there is none."""
    import botocore.exceptions as refusals

    try:
        found: dict[str, Any] = aws.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
    except refusals.ClientError as error:
        if error.response["Error"]["Code"] == "ValidationError":
            return None
        raise
    return found


def _wait(stack: str, aws: Aws, say: Say, poll_s: float, limit_s: float) -> dict[str, Any]:
    """Return the stack when it has come to an end; says why it has not, whenever that changes."""
    time.sleep(poll_s)  # what was asked for may not show at once
    until = time.monotonic() + limit_s
    said = ""
    while True:
        found = describe(aws, stack)
        if found is None:
            return {"StackStatus": "DELETE_COMPLETE"}
        if found["StackStatus"].endswith(ENDED) and "IN_PROGRESS" not in found["StackStatus"]:
            return found
        told = "; ".join([found["StackStatus"], *_why(found, aws)])
        if told != said:
            say(told)
            said = told
        if time.monotonic() > until:
            hint = "it goes on without this command; see `strongroom deploy status`"
            raise CommandError(ExitCode.AWS_REFUSED, "timed_out", f"`{stack}` takes too long", hint)
        time.sleep(poll_s)


def _why(stack: dict[str, Any], aws: Aws) -> Iterator[str]:
    name = _endpoint_name(stack)
    if name is None:
        return
    endpoint = _endpoint(aws, name)
    if endpoint is not None:
        age = datetime.datetime.now(datetime.UTC) - endpoint["CreationTime"]
        told = progress.explain(endpoint, len(_streams(aws, name)), age.total_seconds())
        yield f"endpoint `{name}` {told}"


def _endpoint_name(stack: dict[str, Any]) -> str | None:
    given = {one["ParameterKey"]: one.get("ParameterValue") for one in stack.get("Parameters", [])}
    return given.get("EndpointName")


def _endpoint(aws: Aws, name: str) -> dict[str, Any] | None:
    import botocore.exceptions as refusals

    try:
        found: dict[str, Any] = aws.client("sagemaker").describe_endpoint(EndpointName=name)
    except refusals.ClientError as error:
        if error.response["Error"]["Code"] in ("ValidationException", "ResourceNotFound"):
            return None
        raise
    return found


def _streams(aws: Aws, endpoint: str) -> list[Any]:
    import botocore.exceptions as refusals

    logs = aws.client("logs")
    try:
        group = f"/aws/sagemaker/Endpoints/{endpoint}"
        return list(logs.describe_log_streams(logGroupName=group, limit=50)["logStreams"])
    except refusals.ClientError as error:
        if error.response["Error"]["Code"] == "ResourceNotFoundException":
            return []
        raise


def _outputs(stack: dict[str, Any]) -> dict[str, str]:
    return {one["OutputKey"]: one["OutputValue"] for one in stack.get("Outputs", [])}


def _failures(cloud: Any, stack: str) -> list[dict[str, str]]:
    """Return what failed and AWS's reason, first failure first."""
    events = cloud.describe_stack_events(StackName=stack)["StackEvents"]
    failed = [one for one in events if one.get("ResourceStatus", "").endswith("_FAILED")]
    return [
        {"resource": one["LogicalResourceId"], "reason": one.get("ResourceStatusReason", "")}
        for one in reversed(failed)
    ]


def status(stack: str, aws: Aws) -> Result:
    """Return the stack's and the endpoint's state, in words; raises CommandError where there is none."""
    found = describe(aws, stack)
    if found is None:
        hint = "see `strongroom deploy up`"
        raise CommandError(ExitCode.CHECK_FAILED, "no_stack", f"there is no stack `{stack}`", hint)
    return {
        "stack": stack,
        "status": found["StackStatus"],
        "reason": found.get("StackStatusReason", ""),
        "endpoint": next(_why(found, aws), ""),
        "outputs": _outputs(found),
    }


def invoke(
    stack: str, aws: Aws, prompt: str, max_tokens: int | None, stream: bool, show: Callable[[str], None]
) -> Result:
    """Return the answer of a stack's endpoint to one message; raises CommandError where none can come."""
    from infra import invoking

    found = describe(aws, stack)
    name = _endpoint_name(found) if found else None
    endpoint = _endpoint(aws, name) if name else None
    if found is None or name is None or endpoint is None:
        hint = "see `strongroom deploy up`; jobs are started with their own request"
        raise CommandError(ExitCode.CHECK_FAILED, "no_endpoint", f"`{stack}` has no endpoint", hint)
    if endpoint["EndpointStatus"] not in TAKES_CALLS:
        hint = "see `strongroom deploy status`"
        message = f"endpoint `{name}` is {endpoint['EndpointStatus']}"
        raise CommandError(ExitCode.CHECK_FAILED, "not_in_service", message, hint)
    if "AsyncInferenceConfig" in endpoint:
        hint = "put the request into S3 and call InvokeEndpointAsync"
        raise CommandError(ExitCode.USAGE, "asynchronous", f"endpoint `{name}` answers into S3", hint)
    body = invoking.chat_body(prompt, max_tokens, stream)
    component = _outputs(found).get("InferenceComponentName")
    return invoking.call(None, aws.region, name, body, stream, show, component)


def logs(stack: str, aws: Aws, lines: int = LOG_LINES) -> Result:
    """Return the container's last lines; they hold no content. Raises CommandError without an endpoint."""
    found = describe(aws, stack)
    name = _endpoint_name(found) if found else None
    if name is None:
        hint = "jobs write to /aws/sagemaker/TransformJobs and /aws/sagemaker/TrainingJobs"
        raise CommandError(ExitCode.CHECK_FAILED, "no_endpoint", f"`{stack}` has no endpoint", hint)
    group = f"/aws/sagemaker/Endpoints/{name}"
    client = aws.client("logs")
    events = []
    for stream in _streams(aws, name):
        answer = client.get_log_events(
            logGroupName=group, logStreamName=stream["logStreamName"], limit=lines, startFromHead=False
        )
        events += [(one["timestamp"], one["message"]) for one in answer["events"]]
    return {"group": group, "lines": [message for _, message in sorted(events)[-lines:]]}


def down(stack: str, aws: Aws, say: Say, poll_s: float = POLL_S) -> Result:
    """Delete the stack and return what stays; a second run finds nothing and says so."""
    if describe(aws, stack) is None:
        return {"ok": True, "stack": stack, "status": "absent", "left": []}
    cloud = aws.client("cloudformation")
    listed = cloud.get_paginator("list_stack_resources").paginate(StackName=stack)
    held = [one for page in listed for one in page["StackResourceSummaries"]]
    cloud.delete_stack(StackName=stack)
    final = _wait(stack, aws, say, poll_s, DOWN_S)
    ok = final["StackStatus"] == "DELETE_COMPLETE"
    return {"ok": ok, "stack": stack, "status": final["StackStatus"], "left": left_over(held)}


STAYS: Final = {
    "AWS::S3::Bucket": "empty it with all versions, then aws s3api delete-bucket --bucket {id}",
    "AWS::KMS::Key": "aws kms schedule-key-deletion --key-id {id}, once nothing encrypted with it is needed",
}


def left_over(held: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return what the template retains of a stack's resources, and how each goes."""
    return [
        {
            "type": one["ResourceType"],
            "id": one["PhysicalResourceId"],
            "remove": STAYS[one["ResourceType"]].format(id=one["PhysicalResourceId"]),
        }
        for one in held
        if one["ResourceType"] in STAYS and one.get("PhysicalResourceId")
    ]
