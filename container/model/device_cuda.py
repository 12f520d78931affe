"""An NVIDIA GPU as a device: memory, one stream of work, copies beside it, captured launches.

Owns: all that names CUDA. Must not know: models, plans. Building it needs a GPU.
Invariant: work is ordered by one stream; downloads run on a second one behind it, so that the next step's
launches never wait for a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from container.model.device import Operators


class CudaMarker:
    """An event of a stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Block until the stream is past it; the thread sleeps rather than spins."""
        self._event.synchronize()


class CudaDevice:
    """GPU number `index`; operators that read on the host cannot be captured: `captures` is off for them."""

    def __init__(self, operators: Operators, index: int = 0, *, captures: bool = True) -> None:
        self._place = torch.device("cuda", index)
        torch.cuda.set_device(self._place)
        self.operators = operators
        self.capability = torch.cuda.get_device_capability(self._place)
        self._captures = captures
        self._copies = torch.cuda.Stream(self._place)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._place)[0]

    def zeros(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(sizes), dtype=dtype, device=self._place)

    def staging(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(sizes), dtype=dtype, pin_memory=True)

    def upload(self, source: Tensor, to: Tensor) -> CudaMarker:
        to.copy_(source, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._place))
        return CudaMarker(done)

    def download(self, source: Tensor, to: Tensor) -> CudaMarker:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(self._place))
        with torch.cuda.stream(self._copies):
            to.copy_(source, non_blocking=True)
            done.record(self._copies)
        source.record_stream(self._copies)
        return CudaMarker(done)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()  # compiles kernels and makes handles, which a capture must not
        if not self._captures:
            return launch
        torch.cuda.synchronize(self._place)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launch()
        return graph.replay
