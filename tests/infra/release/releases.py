"""What the tests of a release share: making one of a tiny image, changing it as its vendor could."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.release import files, make, openssl
from tests.infra.tiny_image import TinyImage


def release_in(folder: Path, key: Path, tiny: TinyImage | None = None) -> dict[str, Any]:
    folder.mkdir()
    (tiny or TinyImage()).save(folder / files.ARCHIVE)
    wheels = folder.parent / "cache" / "wheelhouse-cpu"
    wheels.mkdir(parents=True, exist_ok=True)
    (wheels / "flask-3.1.3-py3-none-any.whl").write_bytes(b"wheel")
    return make.make(folder, key, "tiny:1", folder.parent / "cache")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def signed_again(release: Path, key: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change release.json and sign it, as a vendor does that made a mistake."""
    document = read(release / files.RELEASE)
    document["files"] = {name: files.digest(release / name) for name in files.LISTED}
    change(document)
    content = json.dumps(document).encode()
    (release / files.RELEASE).write_bytes(content)
    (release / files.SIGNATURE).write_bytes(openssl.sign(key, content))
