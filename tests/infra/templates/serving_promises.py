"""The promises about serving: alarms, rollback, scaling, updates. Same form as `promises`.

Owns: those promises. Must not know: how templates are made.
"""

from __future__ import annotations

from tests.infra.templates.loading import Template, of_type, values
from tests.infra.templates.promises import promise, traffic

DIMENSIONS = {"EndpointName", "VariantName", "InferenceComponentName"}


@promise
def a_sealed_model_is_opened_with_what_was_asked_for(template: Template) -> list[str]:
    """The key's source and the vendor's roots come from parameters; a plain model is never allowed."""
    wanted = {"STRONGROOM_KEY": {"Ref": "KeySource"}, "STRONGROOM_VENDOR_ROOTS": {"Ref": "VendorRoots"}}
    found = []
    for name, held in of_type(template, "SageMaker::Model").items():
        container = held["PrimaryContainer"]
        environment = container.get("Environment", {})
        opened = {key: value for key, value in environment.items() if key in wanted}
        if opened != (wanted if "Image" in container else {}) or "STRONGROOM_ALLOW_PLAINTEXT" in environment:
            found.append(name)
    return found


@promise
def every_alarm_acts(template: Template) -> list[str]:
    return [
        name
        for name, held in of_type(template, "CloudWatch::Alarm").items()
        if not held.get("AlarmActions") or not held.get("OKActions") or "TreatMissingData" not in held
    ]


@promise
def alarms_use_real_dimensions(template: Template) -> list[str]:
    return [
        name
        for name, held in of_type(template, "CloudWatch::Alarm").items()
        if {one["Name"] for dimensions in values(held, "Dimensions") for one in dimensions} - DIMENSIONS
        or not values(held, "Dimensions")
    ]


@promise
def updates_roll_back_on_alarms(template: Template) -> list[str]:
    holders = of_type(template, "SageMaker::Endpoint")
    if traffic(template) == "component":
        holders = of_type(template, "SageMaker::InferenceComponent")
    alarms = of_type(template, "CloudWatch::Alarm")
    found = []
    for name, held in holders.items():
        rollback = held.get("DeploymentConfig", {}).get("AutoRollbackConfiguration", {}).get("Alarms", [])
        named = {one["AlarmName"].get("Ref") for one in rollback}
        if not named or named - alarms.keys():
            found.append(name)
    return found


@promise
def the_role_may_read_the_rollback_alarms(template: Template) -> list[str]:
    rollback = {one["Ref"] for one in values(template["Resources"], "AlarmName") if "Ref" in one}
    policy = of_type(template, "IAM::ManagedPolicy")["ExecutionPolicy"]["PolicyDocument"]["Statement"]
    allowed = {
        arn["Fn::GetAtt"][0]
        for statement in policy
        if statement.get("Sid") == "Rollback"
        for arn in statement["Resource"]
    }
    return sorted(rollback - allowed)


@promise
def what_goes_to_zero_comes_back(template: Template) -> list[str]:
    if traffic(template) not in ("async", "component"):
        return []
    policies = of_type(template, "ApplicationAutoScaling::ScalingPolicy")
    steps = {name for name, held in policies.items() if held["PolicyType"] == "StepScaling"}
    triggers = {
        action.get("Ref")
        for held in of_type(template, "CloudWatch::Alarm").values()
        for action in held.get("AlarmActions", [])
    }
    return [] if steps & triggers else ["FromZeroPolicy"]


@promise
def scaling_waits_for_its_target(template: Template) -> list[str]:
    wanted = "InferenceComponent" if traffic(template) == "component" else "Endpoint"
    return [
        name
        for name in of_type(template, "ApplicationAutoScaling::ScalableTarget")
        if wanted not in template["Resources"][name].get("DependsOn", [])
    ]


@promise
def scaling_counts_requests_in_flight(template: Template) -> list[str]:
    if traffic(template) not in ("realtime", "component"):
        return []
    kinds = values(template["Resources"], "PredefinedMetricType")
    return [] if kinds and all("ConcurrentRequests" in kind for kind in kinds) else ["ScalingPolicy"]


@promise
def a_realtime_endpoint_keeps_an_instance(template: Template) -> list[str]:
    if traffic(template) != "realtime":
        return []
    return [] if template["Parameters"]["MinInstances"]["MinValue"] == 1 else ["MinInstances"]


@promise
def models_and_configs_have_no_name(template: Template) -> list[str]:
    named = [name for name, held in of_type(template, "SageMaker::Model").items() if "ModelName" in held]
    configs = of_type(template, "SageMaker::EndpointConfig").items()
    return named + [name for name, held in configs if "EndpointConfigName" in held]


@promise
def capacity_is_not_waited_for_for_ever(template: Template) -> list[str]:
    if traffic(template) not in ("realtime", "component"):
        return []
    limits = values(template["Resources"], "VariantInstanceProvisionTimeoutInSeconds")
    return [] if limits and all(300 <= limit <= 3600 for limit in limits) else ["EndpointConfig"]


@promise
def the_host_image_follows_the_cuda_version(template: Template) -> list[str]:
    wanted = {"Fn::FindInMap": ["HostImages", {"Ref": "CudaVersion"}, "Ami"]}
    found = []
    for name, held in of_type(template, "SageMaker::EndpointConfig").items():
        found += [
            name for variant in held["ProductionVariants"] if variant.get("InferenceAmiVersion") != wanted
        ]
    return found


@promise
def an_update_keeps_the_scaled_count(template: Template) -> list[str]:
    if traffic(template) not in ("realtime", "async"):
        return []
    endpoints = of_type(template, "SageMaker::Endpoint").items()
    return [name for name, held in endpoints if held.get("RetainAllVariantProperties") is not True]


@promise
def every_resource_that_can_carries_the_stacks_tag(template: Template) -> list[str]:
    kinds = ("SageMaker::Model", "SageMaker::EndpointConfig", "SageMaker::Endpoint", "S3::Bucket", "KMS::Key")
    kinds += (
        "Logs::LogGroup",
        "EC2::VPC",
        "EC2::Subnet",
        "EC2::VPCEndpoint",
        "IAM::Role",
        "CloudWatch::Alarm",
    )
    tag = {"Key": "strongroom:stack", "Value": {"Ref": "AWS::StackName"}}
    return [
        name
        for kind in kinds
        for name, held in of_type(template, kind).items()
        if tag not in held.get("Tags", [])
    ]
