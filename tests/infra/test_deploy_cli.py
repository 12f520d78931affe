"""`strongroom deploy` as people and programs run it: JSON, exit codes, confirmation, no SDK at import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.cli import main
from infra.deploy import aws as room
from infra.report import ExitCode
from infra.templates import render
from tests.infra.recorded import Recorded
from tests.infra.test_deploy_quotas import endpoints, quota_page
from tests.infra.test_deploy_stack import GONE, answers, cloud_stack

Run = Callable[..., tuple[int, str, str]]
FILE = f"{render.ROOT}/{render.FOLDER}/realtime-image-newvpc.parameters.example.json"
UP = ("deploy", "up", "--template", "realtime-image-newvpc", "--stack", "sr", "--parameters", FILE)
GOOD: dict[str, Any] = {
    "ListServiceQuotas": quota_page(8.0),
    "ListEndpoints": endpoints(),
    "DescribeInstanceTypeOfferings": {
        "InstanceTypeOfferings": [{"Location": "us-east-1a"}, {"Location": "us-east-1b"}]
    },
    "BatchGetImage": {"images": [{"repositoryName": "strongroom"}]},
    "ListObjectsV2": {"Contents": [{"Key": "strongroom/v1/model.bin", "Size": 10}]},
    "DescribeAlarms": {"MetricAlarms": []},
}


@pytest.fixture
def strongroom(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line against recorded answers."""

    def run(*arguments: str, **changed: Any) -> tuple[int, str, str]:
        session = Recorded(answers(**(GOOD | changed)))
        made = room.Aws
        code: Any = 0
        with monkeypatch.context() as here:
            here.setattr(room, "Aws", lambda region: made(region, session))
            here.setattr("infra.deploy.stack.POLL_S", 0.0)
            here.setattr("time.sleep", lambda _: None)
            here.setattr(sys, "argv", ["strongroom", *arguments])
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        captured = capfd.readouterr()
        return int(code or 0), captured.out, captured.err

    return run


def document(output: str) -> dict[str, Any]:
    assert output.count("\n") == 1
    loaded: dict[str, Any] = json.loads(output)
    return loaded


def test_a_good_plan_is_a_line_a_check(strongroom: Run) -> None:
    code, out, _ = strongroom("deploy", "plan", *UP[2:])
    assert code == ExitCode.DONE
    assert "ok    quota: ml.g6e.2xlarge for endpoint usage: 8, up to 4 are needed" in out
    assert "FAIL" not in out and "????" not in out


def test_a_plan_with_a_refusal_fails_with_one_json_object(strongroom: Run) -> None:
    code, out, _ = strongroom("deploy", "plan", *UP[2:], "--set", "InstanceType=ml.g5.xlarge", "--json")
    loaded = document(out)
    assert code == ExitCode.DONE and loaded["ok"]  # a quota that is not listed is unchecked, not refused
    code, out, _ = strongroom("deploy", "plan", *UP[2:], "--set", "MaxInstances=9", "--json")
    loaded = document(out)
    assert code == ExitCode.CHECK_FAILED and not loaded["ok"] and loaded["command"] == "deploy plan"
    refused = [one for one in loaded["result"]["findings"] if one["state"] == "refused"]
    assert [one["check"] for one in refused] == ["quota"] and refused[0]["hint"]


def test_malformed_values_are_told_without_asking_aws(strongroom: Run) -> None:
    code, out, _ = strongroom("deploy", "plan", *UP[2:], "--set", "EndpointName=No_", ListServiceQuotas={})
    assert code == ExitCode.CHECK_FAILED
    assert "FAIL  parameters: `EndpointName=No_` is malformed" in out and "AWS was not asked" in out


def test_up_asks_or_needs_yes(strongroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, _, err = strongroom(*UP)
    assert code == ExitCode.USAGE and "add --yes" in err
    code, out, err = strongroom(*UP, "--yes", "--json")
    assert code == ExitCode.DONE and document(out)["result"]["status"] == "CREATE_COMPLETE"
    assert "1 changes" in err


def test_a_dry_run_makes_nothing(strongroom: Run) -> None:
    code, out, _ = strongroom(*UP, "--dry-run", "--json", CreateChangeSet={}, DescribeStacks={})
    assert code == ExitCode.DONE and "findings" in document(out)["result"]


def test_up_stops_at_a_plan_that_refuses(strongroom: Run) -> None:
    code, out, _ = strongroom(*UP, "--yes", "--set", "MaxInstances=50", "--json")
    assert code == ExitCode.CHECK_FAILED and "findings" in document(out)["result"]


def test_status_and_down_speak_json(strongroom: Run) -> None:
    code, out, _ = strongroom(
        "deploy", "status", "--stack", "sr", "--json", DescribeStacks=cloud_stack("CREATE_COMPLETE")
    )
    assert code == ExitCode.DONE and document(out)["result"]["status"] == "CREATE_COMPLETE"
    code, out, _ = strongroom("deploy", "down", "--stack", "sr", "--yes", "--json", DescribeStacks=GONE)
    assert code == ExitCode.DONE and document(out)["result"]["left"] == []
    code, out, _ = strongroom("deploy", "status", "--stack", "sr", "--json", DescribeStacks=GONE)
    assert code == ExitCode.CHECK_FAILED and document(out)["error"]["kind"] == "no_stack"


def test_status_is_readable_for_people(strongroom: Run) -> None:
    code, out, _ = strongroom("deploy", "status", DescribeStacks=cloud_stack("CREATE_IN_PROGRESS"))
    # the recorded answer is as old as this module's import
    assert code == ExitCode.DONE and re.search(r"endpoint: endpoint `strongroom` Creating for \d+ min", out)


def test_the_verbs_are_imported_without_any_sdk() -> None:
    code = "import sys, infra.cli, infra.deploy.commands; "
    code += (
        "print([n for n in ('boto3', 'botocore', 'aws_cdk', 'yaml', 'infra.templates') if n in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=render.ROOT, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.strip() == "[]", shown.stderr


def test_invoke_and_the_memory_options_are_told_apart_from_their_mistakes(
    strongroom: Run, tmp_path: Path
) -> None:
    code, out, _ = strongroom("deploy", "invoke", "--prompt", "x", "--json", DescribeStacks=GONE)
    assert code == ExitCode.CHECK_FAILED and document(out)["error"]["kind"] == "no_endpoint"
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    asked = ("--model-config", str(tmp_path / "config.json"), "--model-gib", "16")
    code, out, _ = strongroom("deploy", "plan", *UP[2:], *asked, "--context-tokens", "4096")
    assert "ok    memory: ml.g6e.2xlarge: 54 contexts of 4,096 tokens beside 16.0 GiB of model" in out
    code, _, err = strongroom("deploy", "plan", *UP[2:], "--model-config", str(tmp_path / "none.json"))
    assert code == ExitCode.USAGE and "hint: give the model's config.json" in err
