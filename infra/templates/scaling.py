"""How many instances or copies run: between a floor and a ceiling, by requests in flight.

Owns: scalable target and policies, the way back from zero. Must not know: alarms that tell people.
Invariant: whatever may go to zero has a step policy that brings it back: target tracking divides by the
number there is, and never leaves zero by itself.
"""

from __future__ import annotations

from typing import Any, Final

from infra.templates.intrinsics import COMPONENT_NAME, VARIANT, ref, sub
from infra.templates.resource import Resource, Resources, resource
from infra.templates.storage import alarm_topic
from infra.templates.variants import Variant

SCALE_OUT_S: Final = 60
SCALE_IN_S: Final = 600
BACKLOG: Final = 5  # queued requests per instance

# What one request costs is 10 ms or 60 s, so requests per minute say nothing: both metrics count those in
# flight, every 10 s. A custom metric on the same value would lose the resolution.
CONCURRENCY: Final = {
    "realtime": "SageMakerVariantConcurrentRequestsPerModelHighResolution",
    "component": "SageMakerInferenceComponentConcurrentRequestsPerCopyHighResolution",
}


def resources(variant: Variant) -> Resources:
    """Return what scales the endpoint or its component."""
    made = {"ScalableTarget": _target(variant), "ScalingPolicy": _tracking(variant)}
    if variant.traffic != "realtime":
        made["FromZeroPolicy"] = _from_zero(variant)
        made["FromZero"] = _from_zero_alarm(variant)
    return made


def _target(variant: Variant) -> Resource:
    component = variant.traffic == "component"
    resource_id = (
        sub("inference-component/${EndpointName}-ic")
        if component
        else sub("endpoint/${EndpointName}/variant/" + VARIANT)
    )
    count = "inference-component:DesiredCopyCount" if component else "variant:DesiredInstanceCount"
    return resource(
        "AWS::ApplicationAutoScaling::ScalableTarget",
        {
            "MaxCapacity": ref("MaxCopies" if component else "MaxInstances"),
            "MinCapacity": choose_floor(variant),
            "ResourceId": resource_id,
            "ScalableDimension": f"sagemaker:{count}",
            "ServiceNamespace": "sagemaker",
        },
        # The resource id is a string: CloudFormation does not see that it names a resource.
        after=("InferenceComponent" if component else "Endpoint",),
    )


def choose_floor(variant: Variant) -> Any:
    """Return the least number: copies go to zero exactly where instances may."""
    if variant.traffic == "component":
        return {"Fn::If": ["WithZero", 0, 1]}
    return ref("MinInstances")


def _tracking(variant: Variant) -> Resource:
    tracking: dict[str, Any] = {"ScaleInCooldown": SCALE_IN_S, "ScaleOutCooldown": SCALE_OUT_S}
    if variant.traffic == "async":
        tracking["CustomizedMetricSpecification"] = {
            "Dimensions": [{"Name": "EndpointName", "Value": ref("EndpointName")}],
            "MetricName": "ApproximateBacklogSizePerInstance",
            "Namespace": "AWS/SageMaker",
            "Statistic": "Average",
        }
        tracking["TargetValue"] = BACKLOG
    else:
        tracking["PredefinedMetricSpecification"] = {"PredefinedMetricType": CONCURRENCY[variant.traffic]}
        tracking["TargetValue"] = ref("TargetConcurrency")
    return resource(
        "AWS::ApplicationAutoScaling::ScalingPolicy",
        {
            "PolicyName": sub("${AWS::StackName}-load"),
            "PolicyType": "TargetTrackingScaling",
            "ScalingTargetId": ref("ScalableTarget"),
            "TargetTrackingScalingPolicyConfiguration": tracking,
        },
    )


def _from_zero(variant: Variant) -> Resource:
    return resource(
        "AWS::ApplicationAutoScaling::ScalingPolicy",
        {
            "PolicyName": sub("${AWS::StackName}-from-zero"),
            "PolicyType": "StepScaling",
            "ScalingTargetId": ref("ScalableTarget"),
            "StepScalingPolicyConfiguration": {
                "AdjustmentType": "ChangeInCapacity",
                "Cooldown": 300 if variant.traffic == "async" else 60,
                "MetricAggregationType": "Average" if variant.traffic == "async" else "Maximum",
                "StepAdjustments": [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}],
            },
        },
    )


def _from_zero_alarm(variant: Variant) -> Resource:
    if variant.traffic == "async":
        dimension = {"Name": "EndpointName", "Value": ref("EndpointName")}
        metric, statistic, period_s = "HasBacklogWithoutCapacity", "Average", 60
    else:
        dimension = {"Name": "InferenceComponentName", "Value": COMPONENT_NAME}
        metric, statistic, period_s = "NoCapacityInvocationFailures", "Maximum", 30
    return resource(
        "AWS::CloudWatch::Alarm",
        {
            "AlarmActions": [ref("FromZeroPolicy"), alarm_topic()],
            "AlarmDescription": "Requests wait and nothing runs: one instance or copy is added.",
            "ComparisonOperator": "GreaterThanOrEqualToThreshold",
            "Dimensions": [dimension],
            "EvaluationPeriods": 1,
            "MetricName": metric,
            "Namespace": "AWS/SageMaker",
            "OKActions": [alarm_topic()],
            "Period": period_s,
            "Statistic": statistic,
            "Threshold": 1,
            "TreatMissingData": "missing",
        },
    )
