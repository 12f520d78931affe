"""Where the product listens when the command line starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import serving
from infra.report import CommandError


def test_a_server_on_a_socket_gets_no_host_and_no_port(tmp_path: Path) -> None:
    before = {"STRONGROOM_HOST": "::", "STRONGROOM_PORT": "1", "SAGEMAKER_BIND_TO_PORT": "2", "PATH": "p"}
    assert serving.environment(before, None, None, [], "unix:/run/s") == {
        "PATH": "p",
        "STRONGROOM_LISTEN": "unix:/run/s",
    }
    by_name = serving.environment({"STRONGROOM_LISTEN": "unix:/run/s"}, None, None, [])
    assert by_name == {"STRONGROOM_LISTEN": "unix:/run/s"}
    with pytest.raises(CommandError) as refused:
        serving.environment({}, None, 8080, [], "unix:/run/s")
    assert refused.value.message == "give one of `--port` and `--listen`"
