"""One running server for every test of the front that does not need its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sagemaker_entry.harness import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.process.poll() is None, "the supervisor died during the tests"
        assert running.engine["running"] == 0, "a request was left behind in the engine"
    assert running.process.returncode == 0
    assert "Traceback" not in running.log
