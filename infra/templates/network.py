"""The new VPC: isolated subnets, the endpoints the variant needs, and no way to the internet.

    client (ClientSg) ---443---> EndpointSg: runtime endpoint, private DNS
    model  (ModelSg)  ---443---> S3 prefix list ---> S3 gateway endpoint
    everything else: nowhere

Owns: VPC, subnets, routes, security groups, VPC endpoints and their policies, flow logs. Must not know: what
runs in it, but which buckets and which endpoint the policies name.
Invariant: no internet gateway, no NAT, no public address, no route but local and S3, no rule for all
addresses.
"""

from __future__ import annotations

from typing import Any, Final

from infra.templates.iam import INVOKE, REASONS, invoked_arns, token_statement, trust
from infra.templates.intrinsics import ACCOUNT, FLOW_LOGS, att, find, log_group_arn, ref, sub
from infra.templates.resource import Resources, policy, resource, statement
from infra.templates.variants import Variant

HTTPS: Final = 443
# What operators inside the VPC need; never the endpoint itself: the platform pulls, ships logs and scales.
OPERATOR_SERVICES: Final = {
    "ApiEndpoint": "sagemaker.api",
    "StsEndpoint": "sts",
    "LogsEndpoint": "logs",
    "MonitoringEndpoint": "monitoring",
}


def vpc_config(variant: Variant) -> dict[str, Any]:
    """Return the network of a model or job."""
    if variant.network == "ownvpc":
        return {"SecurityGroupIds": ref("SecurityGroupIds"), "Subnets": ref("SubnetIds")}
    return {
        "SecurityGroupIds": [att("ModelSg", "GroupId")],
        "Subnets": [ref("SubnetA"), ref("SubnetB")],
    }


def resources(variant: Variant) -> Resources:
    """Return the network and what it lets through."""
    made = _subnets() | _model_group() | _flow_logs()
    made["S3Endpoint"] = resource(
        "AWS::EC2::VPCEndpoint",
        {
            "VpcId": ref("Vpc"),
            "VpcEndpointType": "Gateway",
            "ServiceName": sub("com.amazonaws.${AWS::Region}.s3"),
            "RouteTableIds": [ref("RouteTable")],
            "PolicyDocument": policy(_s3_statements(variant)),
        },
    )
    if variant.has_endpoint:
        made |= _client_groups()
        calls = _within_account(INVOKE[variant.traffic], invoked_arns(variant))
        tokens = [token_statement(principal="*")] if variant.traffic != "async" else []
        made["RuntimeEndpoint"] = _interface("sagemaker.runtime", [calls, *tokens])
        for name, service in OPERATOR_SERVICES.items():
            made[name] = _interface(service, [_within_account(["*"], ["*"])], "WithOperatorEndpoints")
    return made


def _within_account(actions: list[str], targets: list[Any]) -> dict[str, Any]:
    return statement(
        "OurAccountOnly",
        actions,
        targets,
        principal="*",
        condition={"StringEquals": {"aws:PrincipalAccount": ACCOUNT}},
    )


def _s3_statements(variant: Variant) -> list[Any]:
    """Return what passes the gateway: our buckets, and for a package the account that holds its artefacts."""
    arns: list[Any] = []
    if variant.source == "image":
        bucket = "arn:${AWS::Partition}:s3:::${ModelBucketName}"
        arns += [sub(bucket), sub(bucket + "/*")]
    if variant.has_data:
        arns += [att("DataBucket", "Arn"), sub("${DataBucket.Arn}/*")]
    made = []
    if arns:
        actions = ["s3:AbortMultipartUpload", "s3:GetObject", "s3:ListBucket", "s3:PutObject"]
        made.append(_within_account(actions, arns))
    if variant.source == "package":
        holder = find("MarketplaceAccounts", ref("AWS::Region"), "Account")
        made.append(
            statement(
                "PackageArtefacts",
                ["s3:GetObject"],
                ["*"],
                principal="*",
                condition={"StringEquals": {"aws:ResourceAccount": holder}},
            )
        )
    return made


def _subnets() -> Resources:
    made: Resources = {
        "Vpc": resource(
            "AWS::EC2::VPC",
            {"CidrBlock": ref("VpcCidr"), "EnableDnsHostnames": True, "EnableDnsSupport": True},
        ),
        "RouteTable": resource("AWS::EC2::RouteTable", {"VpcId": ref("Vpc")}),
    }
    for index, letter in enumerate("AB"):
        # 128 addresses each: an instance needs two, AWS keeps five.
        made[f"Subnet{letter}"] = resource(
            "AWS::EC2::Subnet",
            {
                "VpcId": ref("Vpc"),
                "AvailabilityZone": ref(f"Zone{index + 1}"),
                "CidrBlock": {"Fn::Select": [index, {"Fn::Cidr": [att("Vpc", "CidrBlock"), 2, 7]}]},
                "MapPublicIpOnLaunch": False,
            },
        )
        made[f"Subnet{letter}Routes"] = resource(
            "AWS::EC2::SubnetRouteTableAssociation",
            {"RouteTableId": ref("RouteTable"), "SubnetId": ref(f"Subnet{letter}")},
        )
    return made


def _model_group() -> Resources:
    return {
        "ModelSg": resource(
            "AWS::EC2::SecurityGroup",
            {
                "GroupDescription": "model: nothing in, S3 through the gateway endpoint out",
                "VpcId": ref("Vpc"),
                "SecurityGroupEgress": [
                    _rule("artefacts and payloads", DestinationPrefixListId=ref("S3PrefixListId"))
                ],
            },
        )
    }


def _client_groups() -> Resources:
    nowhere = {
        "CidrIp": "255.255.255.255/32",
        "Description": "no address at all: without a rule of its own a group may reach everything",
        "FromPort": 252,
        "IpProtocol": "icmp",
        "ToPort": 86,
    }
    return {
        "EndpointSg": resource(
            "AWS::EC2::SecurityGroup",
            {
                "GroupDescription": "interface endpoints: calls of clients in, nothing out",
                "VpcId": ref("Vpc"),
                "SecurityGroupEgress": [nowhere],
            },
        ),
        "ClientSg": resource(
            "AWS::EC2::SecurityGroup",
            {
                "GroupDescription": "attach to applications that call the endpoint",
                "VpcId": ref("Vpc"),
                "SecurityGroupEgress": [
                    _rule("calls", DestinationSecurityGroupId=att("EndpointSg", "GroupId"))
                ],
            },
        ),
        "EndpointFromClients": resource(
            "AWS::EC2::SecurityGroupIngress",
            {
                **_rule("calls", SourceSecurityGroupId=att("ClientSg", "GroupId")),
                "GroupId": att("EndpointSg", "GroupId"),
            },
        ),
    }


def _rule(text: str, **peer: Any) -> dict[str, Any]:
    return {"Description": text, "FromPort": HTTPS, "IpProtocol": "tcp", "ToPort": HTTPS, **peer}


def _interface(service: str, statements: list[Any], condition: str = "") -> dict[str, Any]:
    return resource(
        "AWS::EC2::VPCEndpoint",
        {
            "VpcId": ref("Vpc"),
            "VpcEndpointType": "Interface",
            "ServiceName": sub(f"com.amazonaws.${{AWS::Region}}.{service}"),
            "PrivateDnsEnabled": True,
            "SecurityGroupIds": [att("EndpointSg", "GroupId")],
            "SubnetIds": [ref("SubnetA"), ref("SubnetB")],
            "PolicyDocument": policy(statements),
        },
        condition=condition,
    )


def _flow_logs() -> Resources:
    return {
        "FlowLogRole": resource(
            "AWS::IAM::Role",
            {
                "AssumeRolePolicyDocument": policy([trust("vpc-flow-logs.amazonaws.com")]),
                "Description": "writes the VPC's flow logs into their one log group",
            },
        ),
        "FlowLogPolicy": resource(
            "AWS::IAM::ManagedPolicy",
            {
                "Description": "writing into the flow log group",
                "PolicyDocument": policy(
                    [
                        statement(
                            "WriteFlowLogs",
                            ["logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
                            [log_group_arn(FLOW_LOGS + ":*")],
                        )
                    ]
                ),
                "Roles": [ref("FlowLogRole")],
            },
            metadata={"strongroom": {"reasons": {"WriteFlowLogs": REASONS["WriteFlowLogs"]}}},
        ),
        "FlowLog": resource(
            "AWS::EC2::FlowLog",
            {
                "DeliverLogsPermissionArn": att("FlowLogRole", "Arn"),
                "LogDestinationType": "cloud-watch-logs",
                "LogGroupName": ref("FlowLogs"),
                "ResourceId": ref("Vpc"),
                "ResourceType": "VPC",
                "TrafficType": "ALL",
            },
            after=("FlowLogPolicy",),
        ),
    }
