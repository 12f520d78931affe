"""The instance types the image supports, and the host image for each CUDA version.

Owns: the tables. Must not know: prices, quotas, templates.
Source: enums `ProductionVariantInstanceType`, `TransformInstanceType`, `TrainingInstanceType` and
`ProductionVariantInferenceAmiVersion` of the service model (botocore 1.44.5, a test compares); GPUs and
memory as published by AWS for the EC2 types of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Instance:
    """What matters of an instance type. `local_disk`: NVMe that a volume key does not cover."""

    gpus: int
    gpu_memory_gib: int  # of all its GPUs together
    local_disk: bool = True

    @property
    def batch(self) -> bool:
        """Whether batch transform offers it: nothing above the G6e family."""
        return self.gpu_memory_gib <= 384


ENDPOINT: Final[dict[str, Instance]] = {
    "ml.g5.xlarge": Instance(1, 24),
    "ml.g5.2xlarge": Instance(1, 24),
    "ml.g5.12xlarge": Instance(4, 96),
    "ml.g5.48xlarge": Instance(8, 192),
    "ml.g6.xlarge": Instance(1, 24),
    "ml.g6.2xlarge": Instance(1, 24),
    "ml.g6.12xlarge": Instance(4, 96),
    "ml.g6.48xlarge": Instance(8, 192),
    "ml.g6e.xlarge": Instance(1, 48),
    "ml.g6e.2xlarge": Instance(1, 48),
    "ml.g6e.12xlarge": Instance(4, 192),
    "ml.g6e.48xlarge": Instance(8, 384),
    "ml.p5.48xlarge": Instance(8, 640),
    "ml.p5e.48xlarge": Instance(8, 1128),
}
BATCH: Final = {name: kind for name, kind in ENDPOINT.items() if kind.batch}

# CUDA of the image -> the host image whose driver runs it. Newer drivers run older CUDA, never the reverse.
HOST_IMAGES: Final[dict[str, str]] = {
    "13.0": "al2023-ami-sagemaker-inference-gpu-4-1",  # driver 580
    "12.4": "al2-ami-sagemaker-inference-gpu-3-1",  # driver 550
    "12.2": "al2-ami-sagemaker-inference-gpu-2-1",  # driver 535
}
BATCH_HOST_IMAGE: Final = "al2-ami-sagemaker-batch-gpu-535"


def host_image(cuda: str) -> str:
    """Return the oldest host image whose driver runs `cuda`, as `12.2`; raises ValueError above them all."""
    wanted = tuple(int(part) for part in cuda.split("."))
    able = [known for known in HOST_IMAGES if tuple(int(part) for part in known.split(".")) >= wanted]
    if not able:
        raise ValueError(f"no host image runs CUDA {cuda}")
    return HOST_IMAGES[min(able, key=lambda known: tuple(int(part) for part in known.split(".")))]
