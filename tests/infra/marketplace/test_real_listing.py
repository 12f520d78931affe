"""A listing made with a real model behind it: recorded samples, and the notebook that is committed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.marketplace import figures, folder, notebook, rehearsal, samples
from scripts.endpoint import Endpoint
from tests.infra.marketplace import example, making


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        log.open("w") as sink,
        Endpoint(demo_checkpoint, environment={"STRONGROOM_WORKERS": "1"}, log=sink) as endpoint,
    ):
        yield f"127.0.0.1:{endpoint.port}"


@pytest.mark.real_model
def test_the_committed_notebook_is_what_an_execution_gives(server: str) -> None:
    assert example.executed(server) == example.COMMITTED.read_text(encoding="utf-8")


@pytest.mark.real_model
def test_a_listing_of_a_real_server_passes_its_check(server: str, tmp_path: Path) -> None:
    words = making.words()
    recording, files = samples.record(server, words.samples)
    assert (
        recording.locked
        and "Paris" in json.loads(files[samples.REALTIME_OUTPUT])["choices"][0]["message"]["content"]
    )
    cells = notebook.cells(words, recording.batch_type)
    printed = rehearsal.run(cells, server, words.product.package_name)
    files[notebook.NAME] = notebook.text(notebook.document(cells, printed)).encode()
    digest = hashlib.sha256(files[notebook.NAME]).hexdigest()
    speeds = figures.read_speed([str(making.SPEED)], words.workloads)
    facts = folder.Facts(folder.FORMAT, words, "", making.MODEL, speeds, None, recording, digest)
    result = folder.write(tmp_path / "listing", facts, files)
    assert result["ok"] and {one["state"] for one in result["findings"]} == {"warn"}
