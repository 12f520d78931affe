"""Templates served for the length of a `with`, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from container.text.template import ChatTemplate

QUESTION = [{"role": "user", "content": "hi"}]
GO = [{"role": "user", "content": "go"}]


@contextlib.contextmanager
def served(source: str, **options: Any) -> Iterator[ChatTemplate]:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"}, **options)
    try:
        yield template
    finally:
        template.close()


def on_demand(bomb: str) -> str:
    """Return a template that renders harmlessly until a message says `go`."""
    return "{% if messages[0].content == 'go' %}" + bomb + "{% else %}fine{% endif %}"
