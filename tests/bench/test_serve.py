"""The whole of `scripts/bench serve --quick` on a tiny model, and the command line around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import __main__ as bench
from tests.bench import serve
from tests.bench.protocol import ROOT
from tests.bench.tiny_model import write_checkpoint


def test_every_workload_runs_end_to_end_in_its_quick_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    words = ["serve", "--quick", "--model", str(model), "--quantize", "none", "--out", str(out)]
    assert bench.main(words) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["ok"] and last["model"] == "tiny" and not last["failures"]
    inside, outside = last["summary"]["strongroom none"], last["summary"]["strongroom none http"]
    assert inside.keys() == {"W1", "W2", "W3", "W4", "W4s"} and outside.keys() == {"W3"}
    assert inside["W1"]["decode_tok_s"] > 0 and outside["W3"]["output_tok_s"] > 0
    document = json.loads((out / "result.json").read_text())
    assert [point["load"] for point in document["open_loop"]["strongroom none http"]["points"]] == [0.5, 2.0]
    points = document["steps"]["strongroom none"]["points"]
    assert {(p["batch"], p["context"]) for p in points} >= {(b, c) for b in (1, 2, 4) for c in (32, 64)}
    assert document["steps"]["strongroom none"]["terms"]["decode"]["points"] == 6
    assert 0 < document["steps"]["strongroom none"]["share"]["engine_share"] < 1
    assert document["idle"]["strongroom none http"] >= 0
    phases = document["starts"]["strongroom none http"][0]
    assert 0 < phases["log: listening"] < phases["first 200 on /ping"]
    assert {"opening", "warmup"} & phases.keys()
    assert str(tmp_path) not in (out / "result.json").read_text() + printed
    assert {path.name for path in out.iterdir()} == {
        "result.json",
        *("rates.png", "load.png", "steps.png", "start.png"),
    }


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--workloads", "W8"],
        ["serve", "--workloads", ""],
        ["peers", "--peers", "nobody"],
        ["peers", "--workloads", "W5"],
        ["compare", "HEAD"],
        ["serve", "--model", "seeded:nothing"],
        ["serve", "--rounds", "2"],
        [],
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse(words)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_what_is_too_short_to_mean_anything_stays_out_of_the_repository(tmp_path: Path) -> None:
    model = tmp_path / "smollm2-135m-instruct-b179c9523d0e6a0f-v2"
    quick, full = (
        bench.parse(["peers", "--model", str(model), *more]) for more in (["--quick"], ["--rounds", "3"])
    )
    assert bench.folder_of(full, bench.plan_of(full)) == bench.RESULTS / "peers-smollm2-135m-instruct"
    assert bench.folder_of(quick, bench.plan_of(quick)).is_relative_to(ROOT / ".cache")
    assert (bench.plan_of(quick).rounds, bench.plan_of(quick).repeats) == (1, 0)


def test_our_endpoint_whose_supervisor_knows_a_hang_is_not_paused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert serve.ours(tmp_path, "none").pauses
    assert not serve.ours(tmp_path, "none", http=True).pauses


def test_a_run_without_figures_or_with_a_failure_of_ours_is_not_ok() -> None:
    ours = {"engine": "strongroom none", "workload": "W1", "round": 1}
    theirs = {"engine": "vllm", "workload": "W1", "round": 1, "error": "it ended"}
    assert bench.ok({"records": [{**ours, "figures": {}}, theirs], "failures": {"vllm": "it ended"}})
    assert not bench.ok({"records": [{**ours, "error": "it ended"}], "failures": {}})
    assert not bench.ok({"records": [theirs], "failures": {}})
    assert not bench.ok(
        {"records": [], "failures": {"strongroom none http W5": "it ended"}, "starts": {"x": 1}}
    )
