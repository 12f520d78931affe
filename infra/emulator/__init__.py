"""A local SageMaker runtime in front of a real container.

    caller -> server (Caller) -> service (routes, checks) -> upstream (Exchange) -> container

Owns: what the platform does between an SDK and `/invocations`: signatures, limits, headers, framing, errors.
Must not know: the container's dialects, how the container was started.
Nothing here imports an AWS SDK, and nothing here has been compared with AWS itself.
"""

from infra.emulator.server import LOCAL_KEYS, LOCAL_REGION, Emulator
from infra.emulator.service import Limits
from infra.emulator.stores import FolderStore, S3Store

__all__ = ["LOCAL_KEYS", "LOCAL_REGION", "Emulator", "FolderStore", "Limits", "S3Store"]
