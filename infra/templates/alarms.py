"""The alarms that tell people, and the two that roll an update back.

Owns: metrics, thresholds and reasons of each alarm. Must not know: scaling.
Invariant: every alarm acts (topic on alarm and on recovery) and says what missing data means; an endpoint at
zero publishes nothing, so silence is never an alarm.

Source of names and units: SageMaker developer guide, monitoring-cloudwatch. ModelLatency is in microseconds;
GPU figures are sums over GPUs, 0 to 100 each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from infra.templates.intrinsics import COMPONENT_NAME, VARIANT, find, ref, sub
from infra.templates.resource import Resource, Resources, resource
from infra.templates.storage import alarm_topic
from infra.templates.variants import Variant

INVOCATIONS: Final = "AWS/SageMaker"
HARDWARE: Final = "/aws/sagemaker/Endpoints"
MINUTE_S: Final = 60


@dataclass(frozen=True, slots=True)
class Watch:
    """One alarm on one metric; `why` is the text people get."""

    metric: str
    statistic: str
    threshold: Any
    why: str
    namespace: str = INVOCATIONS
    periods: int = 1
    period_s: int = MINUTE_S


ERRORS: Final = Watch(
    "Invocation5XXErrors", "Sum", 1, "The container fails requests, for three minutes.", periods=3
)
DISK: Final = Watch(
    "DiskUtilization", "Maximum", 85, "The instances' disks fill up.", namespace=HARDWARE, periods=5
)
STREAM: Final[dict[str, Watch]] = {
    "FirstChunk": Watch(
        "FirstChunkLatency", "p99", 20_000_000, "Streams start late: 20 s for one in a hundred.", periods=5
    ),
    "MidStream": Watch("MidStreamErrors", "Sum", 1, "Streams break off.", period_s=5 * MINUTE_S),
}
ASYNC: Final[dict[str, Watch]] = {
    "BacklogAge": Watch(
        "TimeInBacklog", "Maximum", 900_000, "Requests wait over a quarter of an hour (ms).", periods=5
    ),
    "Expired": Watch("ExpiredRequests", "Sum", 1, "Requests expired before they were begun."),
    "UploadFailures": Watch("ResponseUploadFailures", "Sum", 1, "Answers could not be stored."),
    "DownloadFailures": Watch("RequestDownloadFailures", "Sum", 1, "Payloads could not be read."),
    "NotifyFailures": Watch("NotificationFailures", "Sum", 1, "Notifications could not be sent."),
}


def rollback_names(variant: Variant) -> tuple[str, ...]:
    """Return the alarms that end an update and take it back."""
    if not variant.has_endpoint:
        return ()
    return ("Errors5xx",) if variant.traffic == "async" else ("Errors5xx", "LatencyP99")


def resources(variant: Variant) -> Resources:
    """Return the alarms of an endpoint; jobs have none, their end is an event."""
    if not variant.has_endpoint:
        return {}
    made = {
        "Errors5xx": _alarm(ERRORS),
        "ErrorRate4xx": _error_rate(),
        "Disk": _alarm(DISK),
        "GpuMemory": _gpu_memory(),
    }
    watches = dict(ASYNC)
    if variant.traffic != "async":
        made["LatencyP99"] = _latency()
        made["Saturation"] = _saturation(variant)
        watches = dict(STREAM)
    made |= {name: _alarm(watch) for name, watch in watches.items()}
    return made


def dimensions() -> list[Any]:
    """Return what names the one production variant in metrics."""
    return [
        {"Name": "EndpointName", "Value": ref("EndpointName")},
        {"Name": "VariantName", "Value": VARIANT},
    ]


def _frame(why: str, periods: int, threshold: Any, comparison: str) -> dict[str, Any]:
    return {
        "AlarmActions": [alarm_topic()],
        "AlarmDescription": why,
        "ComparisonOperator": comparison,
        "EvaluationPeriods": periods,
        "OKActions": [alarm_topic()],
        "Threshold": threshold,
        "TreatMissingData": "notBreaching",
    }


def _alarm(watch: Watch, threshold: Any = None) -> Resource:
    made = _frame(
        watch.why,
        watch.periods,
        watch.threshold if threshold is None else threshold,
        "GreaterThanOrEqualToThreshold",
    )
    made |= {
        "Dimensions": dimensions(),
        "MetricName": watch.metric,
        "Namespace": watch.namespace,
        "Period": watch.period_s,
    }
    if watch.statistic.startswith("p"):
        made["EvaluateLowSampleCountPercentile"] = "ignore"
        made["ExtendedStatistic"] = watch.statistic
    else:
        made["Statistic"] = watch.statistic
    return resource("AWS::CloudWatch::Alarm", made)


def _query(name: str, metric: str, statistic: str, named: list[Any], namespace: str, period_s: int) -> Any:
    return {
        "Id": name,
        "MetricStat": {
            "Metric": {"Dimensions": named, "MetricName": metric, "Namespace": namespace},
            "Period": period_s,
            "Stat": statistic,
        },
        "ReturnData": False,
    }


def _expression(text: Any, label: str) -> dict[str, Any]:
    return {"Expression": text, "Id": "result", "Label": label, "ReturnData": True}


def _error_rate() -> Resource:
    period_s = 15 * MINUTE_S
    made = _frame(
        "Over 5 percent of calls are refused as malformed; looked at from 20 calls on.",
        1,
        5,
        "GreaterThanThreshold",
    )
    made["Metrics"] = [
        _query("refused", "Invocation4XXErrors", "Sum", dimensions(), INVOCATIONS, period_s),
        _query("calls", "Invocations", "Sum", dimensions(), INVOCATIONS, period_s),
        _expression("IF(calls > 20, 100 * refused / calls, 0)", "refused, percent"),
    ]
    return resource("AWS::CloudWatch::Alarm", made)


def _latency() -> Resource:
    # CloudFormation does not multiply: the metric is brought to seconds instead of the threshold to
    # microseconds.
    made = _frame(
        "One answer in a hundred takes longer than promised (seconds).",
        3,
        ref("LatencyAlarmSeconds"),
        "GreaterThanOrEqualToThreshold",
    )
    made["Metrics"] = [
        _query("latency", "ModelLatency", "p99", dimensions(), INVOCATIONS, MINUTE_S),
        _expression("latency / 1000000", "p99, seconds"),
    ]
    return resource("AWS::CloudWatch::Alarm", made)


def _saturation(variant: Variant) -> Resource:
    named, metric = dimensions(), "ConcurrentRequestsPerModel"
    if variant.traffic == "component":
        metric = "ConcurrentRequestsPerCopy"
        named = [{"Name": "InferenceComponentName", "Value": COMPONENT_NAME}]
    made = _frame(
        "Requests in flight near the admission limit (percent); soon calls are answered 429.",
        5,
        90,
        "GreaterThanOrEqualToThreshold",
    )
    made["Metrics"] = [
        _query("flying", metric, "Maximum", named, INVOCATIONS, MINUTE_S),
        _expression(sub("100 * flying / ${AdmissionLimit}"), "of the admission limit, percent"),
    ]
    return resource("AWS::CloudWatch::Alarm", made)


def _gpu_memory() -> Resource:
    # The figure is a sum over GPUs. The engine reserves its memory at the start and stays there: above that
    # is another process, or a leak. The pressure of requests is the engine's own metric.
    watch = Watch(
        "GPUMemoryUtilization",
        "Maximum",
        None,
        "GPU memory is full beyond what the engine reserved (98 percent, summed).",
        namespace=HARDWARE,
        periods=5,
    )
    return _alarm(watch, find("InstanceTypes", ref("InstanceType"), "GpuMemoryAlarm"))
