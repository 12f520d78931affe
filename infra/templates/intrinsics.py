"""CloudFormation's intrinsic functions, and the expressions that several files share.

Owns: the spelling of intrinsics and of names derived from parameters. Must not know: any resource.
Invariant: an endpoint's name, ARN and log group are always written from the parameter, never read back from
the resource: alarms that guard the endpoint's updates would otherwise depend on it and it on them.
"""

from __future__ import annotations

from typing import Any, Final

Value = Any  # a JSON value of a template
Properties = dict[str, Any]


def ref(name: str) -> Properties:
    """Return a reference to a parameter or resource."""
    return {"Ref": name}


def att(logical_id: str, attribute: str) -> Properties:
    """Return an attribute of a resource."""
    return {"Fn::GetAtt": [logical_id, attribute]}


def sub(text: str, **values: Value) -> Properties:
    """Return `text` with its `${...}` filled in; `values` adds names of its own."""
    return {"Fn::Sub": [text, values]} if values else {"Fn::Sub": text}


def choose(condition: str, yes: Value, no: Value) -> Properties:
    """Return `yes` where the named condition holds, else `no`."""
    return {"Fn::If": [condition, yes, no]}


def find(mapping: str, key: Value, name: str) -> Properties:
    """Return an entry of a mapping."""
    return {"Fn::FindInMap": [mapping, key, name]}


def equals(left: Value, right: Value) -> Properties:
    """Return the condition that two values are equal."""
    return {"Fn::Equals": [left, right]}


def negate(condition: Properties) -> Properties:
    """Return the opposite of a condition."""
    return {"Fn::Not": [condition]}


NO_VALUE: Final = ref("AWS::NoValue")
ACCOUNT: Final = ref("AWS::AccountId")
VARIANT: Final = "AllTraffic"  # the one production variant's name

ENDPOINT_ARN: Final = sub(
    "arn:${AWS::Partition}:sagemaker:${AWS::Region}:${AWS::AccountId}:endpoint/${EndpointName}"
)
COMPONENT_NAME: Final = sub("${EndpointName}-ic")
COMPONENT_ARN: Final = sub(
    "arn:${AWS::Partition}:sagemaker:${AWS::Region}:${AWS::AccountId}:inference-component/${EndpointName}-ic"
)
ENDPOINT_LOGS: Final = "/aws/sagemaker/Endpoints/${EndpointName}"
COMPONENT_LOGS: Final = "/aws/sagemaker/InferenceComponents/${EndpointName}-ic"
FLOW_LOGS: Final = "/strongroom/${AWS::StackName}/flow"
JOB_LOGS: Final = {"batch": "/aws/sagemaker/TransformJobs", "train": "/aws/sagemaker/TrainingJobs"}


def log_group_arn(name: str) -> Properties:
    """Return the ARN of a log group, and with `:*` what lies in it."""
    return sub("arn:${AWS::Partition}:logs:${AWS::Region}:${AWS::AccountId}:log-group:" + name)
