"""Why an endpoint is not there yet, in a sentence.

Owns: the sentences. Must not know: how AWS is asked.
Invariant: says what is known and what is not; a reason that AWS gives is passed on unchanged.

The platform tells little of an endpoint that is being created: that no container has written a line yet means
that capacity is sought or the image is pulled; a first line means that the model is being loaded.
"""

from __future__ import annotations

from typing import Any, Final

STATUSES: Final = {
    "Updating": "an update is replacing instances",
    "SystemUpdating": "AWS is patching the instances",
    "RollingBack": "an alarm rolled the update back",
    "Deleting": "it is being deleted",
    "OutOfService": "it takes no calls",
    "UpdateRollbackFailed": "the roll back failed; AWS support must look",
}


def explain(endpoint: dict[str, Any], log_streams: int, age_s: float) -> str:
    """Return why `endpoint` (DescribeEndpoint's answer) is in its state; `log_streams` it has written to."""
    status = str(endpoint["EndpointStatus"])
    if status == "InService":
        return "in service"
    if status == "Failed":
        return f"failed: {endpoint.get('FailureReason', 'AWS gives no reason')}"
    told = _told(endpoint)
    if told:
        return f"{status}: {told}"
    if status != "Creating":
        return f"{status}: {STATUSES.get(status, 'AWS gives no reason')}"
    minutes = int(age_s // 60)
    if log_streams == 0:
        return (
            f"Creating for {minutes} min: no container has started; AWS is finding an instance, pulling the "
            "image or fetching the model"
        )
    return (
        f"Creating for {minutes} min: the container runs and its health check has not passed; it is loading "
        "the model, or see `strongroom deploy logs`"
    )


def _told(endpoint: dict[str, Any]) -> str:
    """Return what AWS says of the variants that are on their way."""
    pending = endpoint.get("PendingDeploymentSummary", {}).get("ProductionVariants", [])
    parts = [
        f"{one['Status']} {one.get('StatusMessage', '')}".strip()
        for variant in [*pending, *endpoint.get("ProductionVariants", [])]
        for one in variant.get("VariantStatus", [])
    ]
    return ", ".join(dict.fromkeys(parts))
