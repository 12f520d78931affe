"""The model, the endpoint's configuration, the endpoint and its inference component.

    Model (image + sealed artefact, or package) -> EndpointConfig -> Endpoint [-> InferenceComponent]

Owns: their properties. Must not know: alarms beyond the names of those that roll back, scaling.
Invariant: isolation is on; what could carry content out without the container's help (data capture, core
dumps, SSM access, answers inside notifications) is not written anywhere. Model and configuration carry no
name: each of their changes is a replacement, which a fixed name would make impossible.
"""

from __future__ import annotations

from typing import Any, Final

from infra.templates.iam import volume_key_arn
from infra.templates.intrinsics import (
    COMPONENT_NAME,
    NO_VALUE,
    VARIANT,
    att,
    choose,
    find,
    ref,
    sub,
)
from infra.templates.network import vpc_config
from infra.templates.resource import Resource, Resources, resource
from infra.templates.variants import Variant

PROVISION_S: Final = 1800  # without a limit an endpoint waits for capacity in `Creating` for a day
METRICS_S: Final = 10
PREFIX_BYTES: Final = 4096  # of a body, that are compared: a system prompt with what precedes it
PREFIX_CONCURRENCY: Final = 8
SCALE_IN_MINUTES: Final = 10


def resources(variant: Variant, rollback_alarms: tuple[str, ...]) -> Resources:
    """Return model, configuration, endpoint and, in component variants, the component."""
    made = {"Model": model(variant)}
    if not variant.has_endpoint:
        return made
    made["EndpointConfig"] = _config(variant)
    made["Endpoint"] = _endpoint(variant, rollback_alarms)
    if variant.traffic == "component":
        made["InferenceComponent"] = _component(rollback_alarms)
    return made


def package_arn(kind: str, parameter: str) -> dict[str, Any]:
    """Return the ARN of a subscribed product in this region; `kind` as in ARNs."""
    holder = find("MarketplaceAccounts", ref("AWS::Region"), "Account")
    text = f"arn:${{AWS::Partition}}:sagemaker:${{AWS::Region}}:${{Holder}}:{kind}/${{{parameter}}}"
    return sub(text, Holder=holder)


def model(variant: Variant) -> Resource:
    """Return the model; without a way to the network, whatever it contains."""
    if variant.source == "package":
        container: dict[str, Any] = {"ModelPackageName": package_arn("model-package", "ModelPackageName")}
    elif variant.traffic == "batch":
        container = {
            "Image": ref("ImageUri"),
            "ModelDataUrl": sub("s3://${ModelBucketName}/${ModelTarKey}"),
        }
    else:
        source = {
            "CompressionType": choose("WithArchive", "Gzip", "None"),
            "S3DataType": choose("WithArchive", "S3Object", "S3Prefix"),
            "S3Uri": sub("s3://${ModelBucketName}/${ModelKey}"),
        }
        container = {"Image": ref("ImageUri"), "ModelDataSource": {"S3DataSource": source}}
    container["Environment"] = {"STRONGROOM_MAX_CONCURRENT_REQUESTS": ref("AdmissionLimit")}
    if variant.source == "image":  # a Marketplace package says so itself
        container["Environment"] |= {
            "STRONGROOM_KEY": ref("KeySource"),
            "STRONGROOM_VENDOR_ROOTS": ref("VendorRoots"),
        }
    if variant.has_endpoint:
        container["Environment"]["STRONGROOM_TENSOR_PARALLEL"] = ref("TensorParallel")
    return resource(
        "AWS::SageMaker::Model",
        {
            "EnableNetworkIsolation": True,
            "ExecutionRoleArn": att("ExecutionRole", "Arn"),
            "PrimaryContainer": container,
            "VpcConfig": vpc_config(variant),
        },
        after=("ExecutionPolicy",),
    )


def _config(variant: Variant) -> Resource:
    properties: dict[str, Any] = {
        "KmsKeyId": volume_key_arn(),
        "MetricsConfig": {
            "EnableDetailedObservability": True,
            "EnableEnhancedMetrics": True,
            "MetricPublishFrequencyInSeconds": METRICS_S,
        },
        "ProductionVariants": [_variant(variant)],
    }
    if variant.traffic == "component":
        # The role is required here although no schema says so; the models come later, so the promise is made
        # here.
        properties["EnableNetworkIsolation"] = True
        properties["ExecutionRoleArn"] = att("ExecutionRole", "Arn")
        properties["VpcConfig"] = vpc_config(variant)
    if variant.traffic == "async":
        properties["AsyncInferenceConfig"] = _async()
    return resource("AWS::SageMaker::EndpointConfig", properties, after=("ExecutionPolicy",))


def _variant(variant: Variant) -> dict[str, Any]:
    made: dict[str, Any] = {
        "InferenceAmiVersion": find("HostImages", ref("CudaVersion"), "Ami"),
        "VariantName": VARIANT,
        "VolumeSizeInGB": choose("WithVolume", ref("VolumeSizeGiB"), NO_VALUE),
    }
    if variant.traffic == "async":
        made["InstanceType"] = ref("InstanceType")
    else:
        third = choose("WithThirdPool", {"InstanceType": ref("InstanceType3"), "Priority": 3}, NO_VALUE)
        pools = [
            {"InstanceType": ref("InstanceType"), "Priority": 1},
            {"InstanceType": ref("InstanceType2"), "Priority": 2},
            third,
        ]
        made["InstancePools"] = choose("WithPools", pools, NO_VALUE)
        made["InstanceType"] = choose("WithPools", NO_VALUE, ref("InstanceType"))
        made["RoutingConfig"] = {
            "PrefixAwareRoutingConfig": choose(
                "WithPrefixRouting",
                {"ConcurrencyThreshold": PREFIX_CONCURRENCY, "PrefixLength": PREFIX_BYTES},
                NO_VALUE,
            ),
            "RoutingStrategy": ref("Routing"),
        }
        made["VariantInstanceProvisionTimeoutInSeconds"] = PROVISION_S
    if variant.traffic == "component":
        made["InitialInstanceCount"] = 1
        made["ManagedInstanceScaling"] = {
            "MaxInstanceCount": ref("MaxInstances"),
            "MinInstanceCount": ref("MinInstances"),
            "ScaleInPolicy": {"CooldownInMinutes": SCALE_IN_MINUTES, "Strategy": "IDLE_RELEASE"},
            "Status": "ENABLED",
        }
        return made
    # An async endpoint starts with one instance and goes to its floor, which may be zero, by itself.
    made["InitialInstanceCount"] = 1 if variant.traffic == "async" else ref("MinInstances")
    made["InitialVariantWeight"] = 1
    made["ModelName"] = att("Model", "ModelName")
    made["ContainerStartupHealthCheckTimeoutInSeconds"] = ref("StartupTimeoutSeconds")
    made["ModelDataDownloadTimeoutInSeconds"] = ref("DownloadTimeoutSeconds")
    return made


def _async() -> dict[str, Any]:
    # No answer goes into a notification: `IncludeInferenceResponseIn` is absent on purpose.
    return {
        "ClientConfig": {"MaxConcurrentInvocationsPerInstance": ref("AdmissionLimit")},
        "OutputConfig": {
            "KmsKeyId": volume_key_arn(),
            "NotificationConfig": {"ErrorTopic": ref("ErrorTopic"), "SuccessTopic": ref("SuccessTopic")},
            "S3FailurePath": sub("s3://${DataBucket}/failure/"),
            "S3OutputPath": sub("s3://${DataBucket}/output/"),
        },
    }


def _endpoint(variant: Variant, rollback_alarms: tuple[str, ...]) -> Resource:
    properties: dict[str, Any] = {
        "EndpointConfigName": att("EndpointConfig", "EndpointConfigName"),
        "EndpointName": ref("EndpointName"),
    }
    if variant.traffic != "component":  # there the component is what rolls
        properties["DeploymentConfig"] = _deployment(variant, rollback_alarms)
        properties["RetainAllVariantProperties"] = (
            True  # else an update resets the instances that scaling chose
        )
    return resource("AWS::SageMaker::Endpoint", properties, after=("EndpointLogs",))


def _rollback(alarms: tuple[str, ...]) -> dict[str, Any]:
    return {"Alarms": [{"AlarmName": ref(alarm)} for alarm in alarms]}


def _deployment(variant: Variant, rollback_alarms: tuple[str, ...]) -> dict[str, Any]:
    rolling = {
        "MaximumBatchSize": {"Type": "CAPACITY_PERCENT", "Value": 50},
        "MaximumExecutionTimeoutInSeconds": 14400,
        "RollbackMaximumBatchSize": {"Type": "CAPACITY_PERCENT", "Value": 100},
        "WaitIntervalInSeconds": 120,
    }
    at_once = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 300}
    canary = {
        "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 10},
        "Type": "CANARY",
        "WaitIntervalInSeconds": 300,
    }
    new_fleet: dict[str, Any] = {
        "MaximumExecutionTimeoutInSeconds": 14400,
        "TerminationWaitInSeconds": 300,
        "TrafficRoutingConfiguration": at_once,
    }
    made: dict[str, Any] = {"AutoRollbackConfiguration": _rollback(rollback_alarms)}
    if variant.source == "package":  # AWS's deployment guardrails leave Marketplace containers out
        made["BlueGreenUpdatePolicy"] = new_fleet
        return made
    routing = choose("WithCanary", canary, at_once)
    made["BlueGreenUpdatePolicy"] = choose(
        "WithRolling", NO_VALUE, {**new_fleet, "TrafficRoutingConfiguration": routing}
    )
    made["RollingUpdatePolicy"] = choose("WithRolling", rolling, NO_VALUE)
    return made


def _component(rollback_alarms: tuple[str, ...]) -> Resource:
    specification = {
        "ComputeResourceRequirements": {
            "MinMemoryRequiredInMb": ref("CopyMemoryMiB"),
            "NumberOfAcceleratorDevicesRequired": ref("TensorParallel"),
        },
        "DataCacheConfig": {"EnableCaching": True},  # image and artefact stay where an instance has had them
        "ModelName": att("Model", "ModelName"),
        "SchedulingConfig": {
            "AvailabilityZoneBalance": {"EnforcementMode": "PERMISSIVE"},
            "PlacementStrategy": "SPREAD",
        },
        "StartupParameters": {
            "ContainerStartupHealthCheckTimeoutInSeconds": ref("StartupTimeoutSeconds"),
            "ModelDataDownloadTimeoutInSeconds": ref("DownloadTimeoutSeconds"),
        },
    }
    rolling = {
        "MaximumBatchSize": {"Type": "COPY_COUNT", "Value": 1},
        "MaximumExecutionTimeoutInSeconds": 14400,
        "RollbackMaximumBatchSize": {"Type": "COPY_COUNT", "Value": 1},
        "WaitIntervalInSeconds": 120,
    }
    return resource(
        "AWS::SageMaker::InferenceComponent",
        {
            "DeploymentConfig": {
                "AutoRollbackConfiguration": _rollback(rollback_alarms),
                "RollingUpdatePolicy": rolling,
            },
            "EndpointName": ref("EndpointName"),
            "InferenceComponentName": COMPONENT_NAME,
            "RuntimeConfig": {"CopyCount": 1},  # a component cannot be made with none; scaling takes it there
            "Specification": specification,
            "VariantName": VARIANT,
        },
        after=("ComponentLogs", "Endpoint"),
    )
