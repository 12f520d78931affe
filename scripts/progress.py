"""What a person at the terminal is told: plain lines, and a progress bar where stderr is a terminal.

Owns: stderr of the verbs. Must not know: what the stages mean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Told = Callable[[str, float], None]  # (stage, share done in [0, 1])


def say(text: str) -> None:
    """Print one line about what is being done."""
    print(f"strongroom: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str) -> Iterator[Told]:
    """Yield a function that takes stage and share done: a bar on a terminal, a line per stage elsewhere."""
    if not sys.stderr.isatty():
        said: set[str] = set()

        def line(stage: str, _share: float) -> None:
            if stage not in said:
                said.add(stage)
                say(f"{title}: {stage}")

        yield line
        return
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)

        def draw(stage: str, share: float) -> None:
            bar.update(task, completed=share, description=stage)

        yield draw
