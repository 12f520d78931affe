"""The matrix of templates: many small files instead of one full of conditions.

Owns: the axes and their values. Must not know: what a value means for any resource.
Invariant: a promise never hangs on a condition; what differs in a promise is another file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TRAFFIC: Final = ("realtime", "async", "component", "batch", "train")
SOURCES: Final = ("image", "package")
NETWORKS: Final = ("newvpc", "ownvpc")
JOBS: Final = ("batch", "train")  # CloudFormation has no job resource: the stack prepares, a request starts


@dataclass(frozen=True, slots=True)
class Variant:
    """One template: how it is called, where the model comes from, whose network it is in."""

    traffic: str
    source: str
    network: str

    @property
    def name(self) -> str:
        """The name people type, and the rendered file's."""
        return f"{self.traffic}-{self.source}-{self.network}"

    @property
    def has_endpoint(self) -> bool:
        """Whether it serves; else it prepares jobs."""
        return self.traffic not in JOBS

    @property
    def has_data(self) -> bool:
        """Whether requests or samples pass through a bucket."""
        return self.traffic in ("async", *JOBS)


ALL: Final = tuple(Variant(t, s, n) for t in TRAFFIC for s in SOURCES for n in NETWORKS)
BY_NAME: Final = {variant.name: variant for variant in ALL}
