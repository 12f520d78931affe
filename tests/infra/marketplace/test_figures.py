"""Figures come from results files: what is no measurement is refused, nothing is made up."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.marketplace import figures
from infra.report import CommandError
from tests.infra.marketplace.making import QUALITY, SPEED

WORKLOADS = {"W3": "32 requests at once"}
ENGINE = "strongroom int8-block http"


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], Any], source: Path = SPEED) -> Path:
    loaded = copy.deepcopy(json.loads(source.read_text(encoding="utf-8")))
    change(loaded)
    made = tmp_path / "result.json"
    made.write_text(json.dumps(loaded), encoding="utf-8")
    return made


def test_figures_are_the_files_own_with_their_origin() -> None:
    loaded = json.loads(SPEED.read_text(encoding="utf-8"))
    found = {one.engine: one for one in figures.read_speed([str(SPEED)], WORKLOADS)}
    held = loaded["summary"][ENGINE]["W3"]
    assert found[ENGINE].figures == {name: held[name] for name in figures.SHOWN}
    origin = found[ENGINE].origin
    assert (origin.command, origin.date) == (loaded["command"], loaded["date"]) and len(origin.sha256) == 64
    assert origin.instance_type == "" and "AMD" in origin.machine


def test_a_file_can_be_said_to_be_of_an_instance_type() -> None:
    (first, *_) = figures.read_speed([f"ml.g6.xlarge={SPEED}"], WORKLOADS)
    assert first.origin.instance_type == "ml.g6.xlarge"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: it.update(failures=["W3"]), "some of its runs failed"),
        (lambda it: it.update(command=""), "no command, date or machine"),
        (lambda it: it.update(date="soon"), "no command, date or machine"),
        (lambda it: it["machine"].pop("cpu"), "no command, date or machine"),
        (lambda it: it.pop("machine"), "no `machine`"),
        (lambda it: it.pop("summary"), "no `summary`"),
        (lambda it: it["summary"][ENGINE]["W3"].update(noisy=1), "was disturbed"),
        (lambda it: it["summary"][ENGINE]["W3"].pop("noisy"), "was disturbed"),
        (lambda it: it["summary"][ENGINE]["W3"].pop("output_tok_s"), "lacks a rate"),
        (lambda it: it["summary"][ENGINE]["W3"].pop("rounds"), "has no figures"),
        (lambda it: it["summary"][ENGINE]["W3"].update(output_tok_s="fast"), "has no figures"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    with pytest.raises(CommandError) as caught:
        figures.read_speed([str(changed(tmp_path, change))], WORKLOADS)
    assert words in caught.value.message and caught.value.kind == "not_measured"


@pytest.mark.parametrize("text", ["", "nothing", "[1]"])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(CommandError, match="not_measured"):
        figures.read_speed([str(tmp_path / "x.json")], WORKLOADS)
    with pytest.raises(CommandError, match="not_measured"):
        figures.read_speed([str(tmp_path / "absent.json")], WORKLOADS)


def test_a_workload_that_nobody_measured_is_not_invented() -> None:
    with pytest.raises(CommandError) as caught:
        figures.read_speed([str(SPEED)], {**WORKLOADS, "W4": "shared beginnings"})
    assert caught.value.message == "no figures were given for `W4`"
    with pytest.raises(CommandError, match="not_measured"):
        figures.read_speed([], WORKLOADS)


def test_only_workloads_with_an_explanation_are_shown() -> None:
    assert {one.workload for one in figures.read_speed([str(SPEED)], WORKLOADS)} == {"W3"}


def test_quality_is_the_files_own() -> None:
    rows = json.loads(QUALITY.read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if row["variant"] == "int8-block")["quality"]
    found = figures.read_quality(QUALITY, "int8-block")
    assert (found.perplexity, found.kl_mean) == (row["perplexity"], row["kl_mean"])
    assert found.top1_agreement == row["top1_agreement"] and found.reference_perplexity > 0


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("int2", lambda it: None),
        ("int8-block", lambda it: it.update(rows=[])),
        ("int8-block", lambda it: it.pop("command")),
        ("int8-block", lambda it: it["machine"].pop("threads")),
        ("int8-block", lambda it: [row.update(quality=None) for row in it["rows"]]),
        ("int8-block", lambda it: it["rows"][2]["quality"].pop("kl_mean")),
    ],
)
def test_quality_that_was_not_measured_is_refused(
    tmp_path: Path, variant: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(CommandError, match="not_measured"):
        figures.read_quality(changed(tmp_path, change, QUALITY), variant)


@pytest.mark.parametrize("variant", ["int2", "none-such"])
def test_a_variant_that_the_file_lacks_is_told_with_those_it_has(variant: str) -> None:
    with pytest.raises(CommandError) as caught:
        figures.read_quality(QUALITY, variant)
    assert f"does not measure `{variant}`" in caught.value.message and "int8-block" in caught.value.hint
