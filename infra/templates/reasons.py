"""Why a linter's finding stands, in one sentence each; nothing is silenced without one.

Owns: the sentences, by linter and finding. Must not know: how a linter is run, which variants there are.
Invariant: each sentence is used, by a rendered template or by a run of the linters, which refuses one that is
not.
"""

from __future__ import annotations

from typing import Final

# Written into the templates, where checkov reads them.
CHECKOV: Final[dict[str, str]] = {
    "CKV_AWS_111": "The network interface calls are the platform's as it attaches the model to the VPC; "
    "EC2 gives them no resource that is known beforehand.",
    "CKV_AWS_109": "The network interface permission is given by the platform as it attaches the model to "
    "the VPC; EC2 gives it no resource that is known beforehand.",
    "CKV_AWS_18": "This bucket receives the access logs; logging it into itself would never end.",
}

_LOGS: Final = "arn:<AWS::Partition>:logs:<AWS::Region>:<AWS::AccountId>:log-group:"
_MODELS: Final = "arn:<AWS::Partition>:s3:::<ModelBucketName>/"
# cdk-nag, AwsSolutions-IAM5: (resource, what it found) -> the statements whose reasons answer it.
NAG: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("ExecutionPolicy", "Resource::*"): ("EcrToken", "Metrics", "Network"),
    ("ExecutionPolicy", f"Resource::{_MODELS}<ModelKey>*"): ("ReadModel",),
    ("ExecutionPolicy", f"Resource::{_MODELS}<ModelTarKey>*"): ("ReadModel",),
    ("ExecutionPolicy", "Resource::<DataBucket.Arn>/input/*"): ("ReadInput",),
    ("ExecutionPolicy", "Resource::<DataBucket.Arn>/output/*"): ("WriteOutput",),
    ("ExecutionPolicy", "Resource::<DataBucket.Arn>/failure/*"): ("WriteOutput",),
    ("ExecutionPolicy", "Resource::<DataBucket.Arn>/checkpoints/*"): ("ReadInput", "WriteOutput"),
    ("ExecutionPolicy", f"Resource::{_LOGS}/aws/sagemaker/Endpoints/<EndpointName>:*"): ("Logs",),
    ("ExecutionPolicy", f"Resource::{_LOGS}/aws/sagemaker/InferenceComponents/<EndpointName>-ic:*"): (
        "Logs",
    ),
    ("ExecutionPolicy", f"Resource::{_LOGS}/aws/sagemaker/TransformJobs:*"): ("JobLogs",),
    ("ExecutionPolicy", f"Resource::{_LOGS}/aws/sagemaker/TrainingJobs:*"): ("JobLogs",),
    ("FlowLogPolicy", f"Resource::{_LOGS}/strongroom/<AWS::StackName>/flow:*"): ("WriteFlowLogs",),
}
_RETENTION: Final = (
    "The retention is a parameter whose least value is a year; the rule reads literal numbers only."
)
# cfn-guard, AWS Control Tower's rules: (rule, resource) -> why it stands.
GUARD: Final[dict[tuple[str, str], str]] = {
    ("cloudwatch_log_group_retention_period_check", "EndpointLogs"): _RETENTION,
    ("cloudwatch_log_group_retention_period_check", "ComponentLogs"): _RETENTION,
    ("cloudwatch_log_group_retention_period_check", "FlowLogs"): _RETENTION,
    (
        "kms_create_grant_aws_service_check",
        "Key",
    ): "The root statement hands the key's administration to IAM, as "
    "AWS asks; the execution role's own grant carries `kms:GrantIsForAWSResource`.",
    (
        "s3_bucket_default_encryption_kms_check",
        "AccessLogBucket",
    ): "S3 delivers no access logs into a bucket whose "
    "default encryption is KMS; this one is encrypted with S3's own keys and holds no content.",
    ("s3_bucket_logging_enabled_check", "AccessLogBucket"): CHECKOV["CKV_AWS_18"],
    (
        "s3_bucket_object_lock_enabled_check",
        "DataBucket",
    ): "Payloads must be deletable: they are the customer's text.",
    (
        "s3_bucket_object_lock_enabled_check",
        "AccessLogBucket",
    ): "Access logs expire with the other logs; who must "
    "hold them longer copies them to an archive of their own.",
    (
        "s3_event_notifications_enabled_check",
        "DataBucket",
    ): "Requests are announced by the endpoint's topics; a second notification would say nothing new.",
    (
        "s3_event_notifications_enabled_check",
        "AccessLogBucket",
    ): "Nothing acts on the arrival of an access log.",
}
