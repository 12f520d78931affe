"""The SageMaker Python SDK, version 3, with Strongroom: endpoints, asynchronous calls, batch.

Owns: the calls as a reader would write them. Must not know: who answers them.
Invariant: every model is isolated from the network. Needs `strongroom[sdk]`; nothing else of ours does.

The SDK cannot stream (`Endpoint.invoke_with_response_stream` raises AttributeError, seen with sagemaker-core
2.27.0): stream with boto3 or through the OpenAI route, whose token `sagemaker.core.token_generator` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sagemaker.core.resources import Endpoint, EndpointConfig, Model, TransformJob
from sagemaker.core.shapes import (
    AsyncInferenceConfig,
    AsyncInferenceOutputConfig,
    ContainerDefinition,
    ModelDataSource,
    ProductionVariant,
    S3ModelDataSource,
    TransformDataSource,
    TransformInput,
    TransformOutput,
    TransformResources,
    TransformS3DataSource,
    VpcConfig,
)

START_S = 1800  # download and start-up of a large model
WAIT_S = 3600


@dataclass(frozen=True)
class Account:
    """What every example needs of yours; `session` is a boto3 session."""

    session: Any
    role: str
    subnets: list[str]
    security_groups: list[str]
    instance_type: str = "ml.g6e.2xlarge"

    @property
    def vpc(self) -> Any:
        """The network that artefacts come through; the container itself has none."""
        return VpcConfig(subnets=self.subnets, security_group_ids=self.security_groups)


def model_from_image(account: Account, name: str, image: str, model_prefix: str) -> Any:
    """Return a model of an image, given by digest, and a prefix in S3 that ends in a slash."""
    source = S3ModelDataSource(s3_uri=model_prefix, s3_data_type="S3Prefix", compression_type="None")
    container = ContainerDefinition(image=image, model_data_source=ModelDataSource(s3_data_source=source))
    return _model(account, name, container)


def model_from_package(account: Account, name: str, package_arn: str) -> Any:
    """Return a model of a package that the account is subscribed to."""
    return _model(account, name, ContainerDefinition(model_package_name=package_arn))


def _model(account: Account, name: str, container: Any) -> Any:
    return Model.create(
        model_name=name,
        execution_role_arn=account.role,
        primary_container=container,
        vpc_config=account.vpc,
        enable_network_isolation=True,
        session=account.session,
    )


def endpoint(account: Account, name: str, model_name: str, async_output: str | None = None) -> Any:
    """Return an endpoint in service; with `async_output`, an S3 URI, one that answers there."""
    variant = ProductionVariant(
        variant_name="AllTraffic",
        model_name=model_name,
        instance_type=account.instance_type,
        initial_instance_count=1,
        container_startup_health_check_timeout_in_seconds=START_S,
        model_data_download_timeout_in_seconds=START_S,
    )
    extra: dict[str, Any] = {}
    if async_output is not None:
        output = AsyncInferenceOutputConfig(s3_output_path=async_output)
        extra["async_inference_config"] = AsyncInferenceConfig(output_config=output)
    EndpointConfig.create(
        endpoint_config_name=name, production_variants=[variant], session=account.session, **extra
    )
    made = Endpoint.create(endpoint_name=name, endpoint_config_name=name, session=account.session)
    made.wait_for_status("InService", timeout=WAIT_S)
    return made


def ask(made: Any, account: Account, body: str) -> bytes:
    """Return the whole answer to a JSON body."""
    answer = made.invoke(
        body=body,
        content_type="application/json",
        session=account.session,
        region=account.session.region_name,
    )
    read: bytes = answer.body.read()
    return read


def ask_later(made: Any, account: Account, input_uri: str) -> str:
    """Return where the answer to a request that lies in S3 will be."""
    told = made.invoke_async(
        input_location=input_uri,
        content_type="application/json",
        session=account.session,
        region=account.session.region_name,
    )
    return str(told.output_location)


def batch(account: Account, name: str, model_name: str, input_uri: str, output_uri: str) -> Any:
    """Return a finished batch job over files with one request a line."""
    source = TransformS3DataSource(s3_data_type="S3Prefix", s3_uri=input_uri)
    job = TransformJob.create(
        transform_job_name=name,
        model_name=model_name,
        batch_strategy="SingleRecord",
        transform_input=TransformInput(
            data_source=TransformDataSource(s3_data_source=source),
            content_type="application/json",
            split_type="Line",
        ),
        transform_output=TransformOutput(
            s3_output_path=output_uri, accept="application/json", assemble_with="Line"
        ),
        transform_resources=TransformResources(instance_type=account.instance_type, instance_count=1),
        session=account.session,
    )
    job.wait(timeout=WAIT_S)
    return job
