"""Loads one rank's part of a model in a process of its own and prints what that took, in bytes.

python -m tests.model.load_memory DIRECTORY RANK SIZE DTYPE [SCHEME [PARTS]]
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from container.model import surgery
from container.model.folders import PlainFolder
from container.model.load import model_class, quiet, read_config
from container.model.preparation import Preparation, facts_of
from container.model.quantize_choose import Scheme
from container.model.quantize_format import format_for
from container.model.source import DirectorySource
from container.model.steps import LayerSteps, Prepared

SAMPLE_S = 0.002


def told(name: str) -> int:
    """Return what the kernel says of this process under `name`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


class Watch:
    """What the process held more than before while it was watched."""

    def __enter__(self) -> Watch:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        self.resident, self.anonymous = told("VmRSS"), told("RssAnon")
        self.most_anonymous = self.anonymous
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = told("VmHWM")
        self._done.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.most_anonymous = max(self.most_anonymous, told("RssAnon"))


def held_bytes(model: Any) -> int:
    """Return the bytes of all parameters and buffers, those that share memory counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    # A mapped tensor's storage may be its whole file.
    own = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return min(sum(storages.values()), sum(own.values()))


def main() -> None:
    directory, rank, size, dtype, scheme, parts = (*sys.argv[1:], *("none", "")[len(sys.argv) - 5 :])
    quiet()
    source = DirectorySource(directory)
    kind = getattr(torch, dtype)
    config = read_config(source)
    model_class(config)  # imports what loading imports, so that only loading is measured
    if Scheme(scheme) is not Scheme.NONE:
        form = format_for(Scheme(scheme))
        form.unpack(form.pack(torch.randn(64, 64)))
    prepared = Preparation(scheme, facts_of(config, kind), surgery.parts("auto"), together=int(size) > 1)
    steps: LayerSteps = prepared.steps
    if parts:
        steps = LayerSteps(
            steps.fuse, steps.quantize, prepared=Prepared(PlainFolder(Path(parts)), prepared.recipe)
        )
    with Watch() as watch:
        loaded = steps.load(source, kind, lambda _: 64, lambda _: None, int(rank), int(size))
        if not parts:
            prepared.complete(loaded.model)
    names = [torch.Size(stored.shape) for _, stored in source.stored()]
    held = [p.nbytes for p in loaded.model.parameters()]
    report = {
        "grown": watch.peak - watch.resident,
        "anonymous": watch.most_anonymous - watch.anonymous,
        "shard": held_bytes(loaded.model),
        "largest": max([shape.numel() * kind.itemsize for shape in names] + held),
        "whole": loaded.parameters * kind.itemsize,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
