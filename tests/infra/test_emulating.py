"""`strongroom emulate` with a store: what it prints, what it refuses, where notifications go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import emulating
from infra.emulator import Emulator
from infra.report import CommandError
from tests.infra.conftest import closing_client
from tests.infra.scripted import ScriptedContainer, reply, wait_until

CONTROL = "AWS_ENDPOINT_URL_SAGEMAKER"


@pytest.fixture
def container() -> Iterator[ScriptedContainer]:
    with ScriptedContainer(reply(b"canary-answer")) as running:
        yield running


def opened(container: ScriptedContainer, *more: Any) -> Emulator:
    return emulating.open_emulator(container.address, "demo", 0, [], False, "none", 1024, *more)


def test_the_control_plane_s_url_is_printed_when_there_is_a_store_to_work_on(
    container: ScriptedContainer, tmp_path: Path
) -> None:
    with opened(container) as plain:
        assert CONTROL not in emulating.describe(plain, "demo")["environment"]
    with opened(container, str(tmp_path)) as stored:
        assert emulating.describe(stored, "demo")["environment"][CONTROL] == stored.url


@pytest.mark.parametrize("place", ["/nowhere/at/all", "s3://bucket"])
def test_a_store_that_is_no_folder_and_no_url_is_refused(container: ScriptedContainer, place: str) -> None:
    with pytest.raises(CommandError) as caught:
        opened(container, place)
    assert caught.value.message.startswith("`store` must be")


def test_asynchronous_calls_need_a_store(container: ScriptedContainer) -> None:
    with pytest.raises(CommandError) as caught:
        opened(container, None, "s3://data/out")
    assert caught.value.message == "`async_output` needs a store"


def test_a_notification_is_one_line_on_stderr_without_content(
    container: ScriptedContainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(container, str(tmp_path), "s3://data/out") as emulator:
        with closing_client(emulator) as client:
            client.invoke_endpoint_async(EndpointName="demo-async", Body=b"canary-prompt")
        wait_until(lambda: bool(emulator.notifications()))
    shown = capfd.readouterr()
    (line,) = shown.err.splitlines()
    assert json.loads(line)["notification"]["invocationStatus"] == "Completed"
    assert shown.out == "" and "canary" not in line
    (written,) = (tmp_path / "data" / "out").iterdir()
    assert written.read_bytes() == b"canary-answer"
