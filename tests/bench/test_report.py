"""A result: medians and ratios from records, tables, plots, and nothing of the machine's paths."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.bench import machine, plots, report


def record(engine: str, workload: str, number: int, noisy: bool = False, **figures: float) -> dict[str, Any]:
    return {
        "engine": engine,
        "workload": workload,
        "round": number,
        "figures": figures,
        "noisy": noisy,
        "foreign_share": 0.01 * number,
        "peak_rss_mib": 100.0 + number,
    }


RECORDS = [
    record("ours", "W1", 1, decode_tok_s=100.0, first_token_s=0.1),
    record("peer", "W1", 1, decode_tok_s=50.0, first_token_s=0.2),
    record("ours", "W1", 2, decode_tok_s=120.0, first_token_s=0.3),
    {"engine": "peer", "workload": "W1", "round": 2, "error": "it ended"},
    record("ours", "W1", 3, True, decode_tok_s=110.0, first_token_s=0.2),
    record("peer", "W1", 3, decode_tok_s=110.0, first_token_s=0.2),
]
POINT = {"load": 1.0, "output_tok_s": 5.0, "goodput_tok_s": 4.0, "refused": 0.0, "failed": 0.0} | {
    f"{kind}_p{share}_s": 0.1 for kind in ("first_token", "inter_token") for share in (50, 95, 99)
}
STEP = {"batch": 1.0, "tokens": 1.0, "context": 128.0, "pairs": 128.0, "step_s": 0.01}
DOCUMENT: dict[str, Any] = {
    "model": "tiny",
    "date": "2026-01-01 00:00 UTC",
    "machine": {"cpu": "a cpu", "cores": 2},
    "records": RECORDS,
    "open_loop": {"ours http": {"capacity_per_s": 2.0, "points": [POINT, {**POINT, "load": 2.0}]}},
    "steps": {
        "ours": {
            "points": [STEP],
            "terms": {"decode": {"fixed_ms": 1.5}, "prefill": None},
            "share": {"step_s": 0.02, "engine_share": 0.031, "sequences": 64},
        }
    },
    "idle": {"ours http": 0.004},
    "starts": {"ours http": [{"opening": 0.5, "first 200 on /ping": 2.0}]},
}


def test_medians_are_of_rounds_without_error_and_say_how_many() -> None:
    done = report.summary(RECORDS)
    assert done["ours"]["W1"]["decode_tok_s"] == 110.0
    assert (done["ours"]["W1"]["rounds"], done["ours"]["W1"]["noisy"]) == (3, 1)
    assert (done["ours"]["W1"]["foreign_share"], done["ours"]["W1"]["peak_rss_mib"]) == (0.03, 103.0)
    assert (done["peer"]["W1"]["decode_tok_s"], done["peer"]["W1"]["rounds"]) == (80.0, 2)


def test_ratios_pair_the_rounds_that_both_have() -> None:
    assert report.against(RECORDS, "ours", "peer")["W1"] == {
        "ratio": 1.5,
        "least": 1.0,
        "most": 2.0,
        "rounds": 2,
    }


def test_ratios_of_times_are_turned_so_that_above_one_is_better() -> None:
    made = report.against(RECORDS, "ours", "peer")
    assert made["W1 first_token_s"]["most"] == 2.0  # 0.2 s against 0.1 s
    starts = [record("ours", "W7", 1, start_s=4.0), record("peer", "W7", 1, start_s=10.0)]
    assert report.against(starts, "ours", "peer")["W7 start_s"]["ratio"] == 2.5


def test_tables_have_a_line_for_each_engine_and_every_part() -> None:
    lines = report.table(report.summary(RECORDS), {"ours": {"start_s": [9.0, 8.5]}}).splitlines()
    assert len(lines) == 4 and lines[2].startswith("ours") and lines[3].startswith("peer")
    assert "8.5" in lines[2] and "110" in lines[2]
    assert len({len(line) for line in lines}) == 1
    ratios = report.ratio_table({"ours / peer": report.against(RECORDS, "ours", "peer")})
    assert "1.50 (1.00-2.00)" in ratios
    extras = "\n".join(report.extras(DOCUMENT))
    assert "3.10% of 20.0 ms at 64" in extras and "0.40% of one CPU" in extras
    assert (
        "capacity 2.00 requests/s" in extras and "fixed_ms 1.5" in extras and "first 200 on /ping" in extras
    )


def test_a_committed_document_holds_no_path_and_no_nan(tmp_path: Path) -> None:
    path = "/" + "somewhere/deep/setup.log"
    document = {"why": f"see `{path}`", "value": math.nan, "rows": [{"x": 0.1234567}], "rate": "3 tokens/s"}
    written = json.loads(report.write(tmp_path / "new", document).read_text())
    assert written == {
        "why": "see `setup.log`",
        "value": None,
        "rows": [{"x": 0.123457}],
        "rate": "3 tokens/s",
    }


def test_the_last_line_is_one_line_of_json() -> None:
    line = report.last_line(
        {"ok": True, "records": RECORDS, "summary": {"a": 1}}, ("ok", "summary", "absent")
    )
    assert line == '{"ok":true,"summary":{"a":1}}'


def test_plots_are_drawn_for_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    assert plots.draw(tmp_path, DOCUMENT) == ["rates.png", "load.png", "steps.png", "start.png"]
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in plots.draw(tmp_path, DOCUMENT)
    )
    bare = {key: DOCUMENT[key] for key in ("model", "date", "machine")}
    assert plots.draw(tmp_path, bare) == []


def test_a_result_says_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model = "/" + "somewhere/models/tiny"
    monkeypatch.setattr("sys.argv", ["x", "serve", "--model", model])
    told = machine.provenance("serve")
    assert told["command"] == "scripts/bench serve --model tiny"
    assert told["machine"]["cores"] >= 1 and told["machine"]["cpu"] and told["machine"]["memory_gib"] > 0
    assert {"python", "torch", "commit"} <= told["versions"].keys()
