"""Tokenizers and models shared by this room's tests; every model's child processes end with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from container.text.model import TextModel
from tests.text import build


class Shelf:
    """Files by family, and one loaded model per family and template."""

    def __init__(self) -> None:
        self._files: dict[str, build.Files] = {}
        self._models: dict[tuple[str, str], TextModel] = {}

    def files(self, family: str) -> build.Files:
        if family not in self._files:
            self._files[family] = build.packed(build.FAMILIES[family]())
        return self._files[family]

    def model(self, family: str, template: str = "chatml") -> TextModel:
        key = (family, template)
        if key not in self._models:
            source = build.TEMPLATES[template]
            self._models[key] = TextModel.load(build.with_template(self.files(family), source))
        return self._models[key]

    def close(self) -> None:
        for model in self._models.values():
            model.close()


@pytest.fixture(scope="session")
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    yield shelf
    shelf.close()


@pytest.fixture(scope="session")
def demo_model(demo_checkpoint: Path) -> Iterator[TextModel]:
    """The text side of the demo model; tests that use it are marked `real_model`."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    )
    paths = [demo_checkpoint / name for name in names]
    model = TextModel.load({path.name: path.read_bytes() for path in paths if path.exists()})
    yield model
    model.close()
