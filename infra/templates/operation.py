"""What an operator looks at and is told: the dashboard, the budget, the end of jobs.

Owns: dashboard, budget, event rule. Must not know: alarms' thresholds.
Invariant: nothing here carries content; a budget warns and stops nothing.
"""

from __future__ import annotations

import json
from typing import Any, Final

from infra.templates.alarms import HARDWARE, INVOCATIONS
from infra.templates.intrinsics import VARIANT, ref, sub
from infra.templates.resource import Resources, resource
from infra.templates.storage import alarm_topic
from infra.templates.variants import Variant

_ENDPOINT: Final = ["EndpointName", "${EndpointName}", "VariantName", VARIANT]
_COMPONENT: Final = ["InferenceComponentName", "${EndpointName}-ic"]
JOB_EVENTS: Final = {
    "batch": ("SageMaker Transform Job State Change", "TransformJobStatus", "TransformJobName"),
    "train": ("SageMaker Training Job State Change", "TrainingJobStatus", "TrainingJobName"),
}


def resources(variant: Variant) -> Resources:
    """Return dashboard and budget, and for jobs the rule that tells when one fails."""
    made: Resources = {"Budget": _budget()}
    if variant.has_endpoint:
        body = json.dumps({"widgets": _widgets(variant)}, separators=(",", ":"))
        made["Dashboard"] = resource(
            "AWS::CloudWatch::Dashboard",
            {"DashboardBody": sub(body), "DashboardName": sub("${AWS::StackName}-${AWS::Region}")},
        )
    else:
        made["JobFailed"] = _job_failed(variant)
    return made


def _widgets(variant: Variant) -> list[Any]:
    space, gpu = INVOCATIONS, HARDWARE
    if variant.traffic == "async":
        flow = [
            ("Backlog", [(space, "ApproximateBacklogSize"), (space, "TimeInBacklog")]),
            ("Failures", [(space, "ExpiredRequests"), (space, "ResponseUploadFailures")]),
        ]
    else:
        flow = [
            ("Latency: first chunk", [(space, "FirstChunkLatency")]),
            ("Concurrency", [(space, "ConcurrentRequestsPerModel")]),
        ]
    panels = [
        ("Calls", [(space, "Invocations"), (space, "InvocationsPerInstance")]),
        ("Latency: model, overhead", [(space, "ModelLatency"), (space, "OverheadLatency")]),
        *flow,
        (
            "Errors",
            [(space, "Invocation5XXErrors"), (space, "Invocation4XXErrors"), (space, "MidStreamErrors")],
        ),
        ("GPU", [(gpu, "GPUUtilization"), (gpu, "GPUMemoryUtilization")]),
        ("Host", [(gpu, "CPUUtilization"), (gpu, "MemoryUtilization"), (gpu, "DiskUtilization")]),
    ]
    widgets = [_widget(title, [[*metric, *_ENDPOINT] for metric in metrics]) for title, metrics in panels]
    if variant.traffic == "component":
        copies = [[space, "NoCapacityInvocationFailures", *_COMPONENT]]
        copies.append([space, "ConcurrentRequestsPerCopy", *_COMPONENT])
        widgets.append(_widget("Copies: none there, in flight", copies))
    return widgets


def _widget(title: str, metrics: list[Any]) -> dict[str, Any]:
    stat = "p99" if title.startswith("Latency") else "Sum" if title in ("Calls", "Errors") else "Maximum"
    properties = {"metrics": metrics, "period": 60, "region": "${AWS::Region}", "stat": stat, "title": title}
    return {"type": "metric", "width": 8, "height": 6, "properties": properties}


def _budget() -> dict[str, Any]:
    subscriber = [{"Address": alarm_topic(), "SubscriptionType": "SNS"}]
    notices = [
        {
            "Notification": {
                "ComparisonOperator": "GREATER_THAN",
                "NotificationType": kind,
                "Threshold": percent,
                "ThresholdType": "PERCENTAGE",
            },
            "Subscribers": subscriber,
        }
        for kind, percent in (("ACTUAL", 80), ("FORECASTED", 100))
    ]
    return resource(
        "AWS::Budgets::Budget",
        {
            "Budget": {
                "BudgetLimit": {"Amount": ref("MonthlyBudgetUsd"), "Unit": "USD"},
                "BudgetType": "COST",
                "CostFilters": {"TagKeyValue": [sub("user:strongroom:stack$${AWS::StackName}")]},
                "TimeUnit": "MONTHLY",
            },
            "NotificationsWithSubscribers": notices,
        },
        condition="WithBudget",
    )


def _job_failed(variant: Variant) -> dict[str, Any]:
    event, status, name = JOB_EVENTS[variant.traffic]
    return resource(
        "AWS::Events::Rule",
        {
            "Description": "a job of this stack failed or was stopped",
            "EventPattern": {
                "detail": {name: [{"prefix": ref("AWS::StackName")}], status: ["Failed", "Stopped"]},
                "detail-type": [event],
                "source": ["aws.sagemaker"],
            },
            "State": "ENABLED",
            "Targets": [{"Arn": alarm_topic(), "Id": "alarms"}],
        },
    )
