"""The sample notebook: its cells run as they stand, a wrong call stops it, and it leaves no trace behind."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest

from infra.marketplace import notebook, rehearsal, request
from infra.marketplace.notebook import Cell
from infra.report import CommandError
from tests.infra.marketplace import example, making

NAME = making.words().product.package_name
CELLS = example.cells()


def run(*code: str) -> list[str]:
    with making.server() as running:
        return rehearsal.run(tuple(Cell("code", source) for source in code), running.address, NAME)


def test_every_cell_runs_and_shows_what_the_server_said() -> None:
    with making.server() as running:
        printed = rehearsal.run(CELLS, running.address, NAME)
        kinds = {kind for path, kind in running.calls if path == "/invocations"}
    assert printed[1:] == [
        "package in us-east-1 is Completed\n",
        "endpoint is InService\n",
        "Paris\ntokens: 3 in, 1 out\n",
        "Paris\n",
        "Paris\n",
        "job is Completed\n- Paris\n- Paris\n- Paris\n",
        "endpoint, configuration and model are deleted; end the subscription on the Marketplace page\n",
    ]
    assert kinds == {"application/json"} and ("/v1/chat/completions", "application/json") in running.calls


CODE = [cell.source for cell in CELLS if cell.kind == "code"]


@pytest.mark.parametrize(
    ("number", "old", "new", "why"),
    [
        (3, '"EnableNetworkIsolation": True', '"EnableNetworkIsolation": False', "`EnableNetworkIsolation`"),
        (3, '"InstanceType": INSTANCE_TYPE', '"InstanceType": "ml.g99.large"', "enum value set"),
        (
            3,
            '"ModelName": NAME,\n            "Inst',
            '"ModelName": "other",\n            "Inst',
            "no Model `other`",
        ),
        (
            3,
            "EndpointName=NAME, EndpointConfigName=NAME",
            'EndpointName=NAME, EndpointConfigName="other"',
            "no End",
        ),
        (7, '"ml.g6.xlarge"', '"ml.p5.48xlarge"', "enum value set"),
        (7, 'SplitType": "Line"', 'SplitType": "Comma"', "enum value set"),
        (7, "ModelName=NAME", 'ModelName="other"', "no Model `other`"),
        (8, "delete_model(ModelName=NAME)", 'delete_model(ModelName="other")', "no Model `other`"),
        (8, "delete_model(ModelName=NAME)", "list_models()", "`ListModels` has no stand-in"),
        (2, "PACKAGES[region]", 'PACKAGES["nowhere"]', "KeyError"),
    ],
)
def test_a_wrong_call_stops_the_run_and_names_its_cell(number: int, old: str, new: str, why: str) -> None:
    assert old in CODE[number - 1]
    code = [*CODE[: number - 1], CODE[number - 1].replace(old, new)]
    with pytest.raises(CommandError) as caught:
        run(*code)
    assert f"cell {number} raised" in caught.value.message and why in caught.value.message


def test_a_batch_line_that_fails_fails_the_job() -> None:
    with making.server(lines=False) as running, pytest.raises(CommandError) as caught:
        rehearsal.run(notebook.cells(making.words(), "application/jsonlines"), running.address, NAME)
    assert "answered 415" in caught.value.message


def test_the_same_name_is_not_made_twice() -> None:
    twice = [*CODE[:3], CODE[2]]
    with pytest.raises(CommandError) as caught:
        run(*twice)
    assert "the Model" in caught.value.message and "exists" in caught.value.message


def test_the_callers_keys_do_not_reach_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    (printed,) = run("import os\nprint(sorted(v for n, v in os.environ.items() if n.startswith('AWS_')))")
    assert "mine" not in printed and "strongroom-local-keys-open-nothing" in printed


def test_a_run_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "RUN_S", 0.5)
    with pytest.raises(CommandError, match="notebook_failed"):
        run("import time\ntime.sleep(60)")


def test_a_notebook_has_the_form_of_nbformat_4() -> None:
    made = notebook.document(CELLS, ["x\ny\n"] * len(CODE))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in made["cells"]}) == len(CELLS)
    for cell in made["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == wanted | (
            {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        )
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert code[0]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["x\n", "y\n"]}]
    empty = notebook.document(CELLS)
    assert all(cell["outputs"] == [] for cell in empty["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("batch_type", ["application/json", "application/jsonlines"])
def test_every_cell_is_python_and_no_place_is_left_open(batch_type: str) -> None:
    for cell in notebook.cells(making.words(), batch_type):
        assert "<<" not in cell.source
        if cell.kind == "code":
            ast.parse(cell.source)


def test_odd_characters_in_the_vendors_words_stay_text() -> None:
    prompts = ['say "x"', "back\\slash {brace}", "Größe"]
    code = [
        cell.source
        for cell in notebook.cells(making.words(samples__prompts=prompts), request.JSON_TYPE)
        if cell.kind == "code"
    ]
    constants = {
        node.value
        for source in code
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert constants >= set(prompts), "a prompt became something else than a text"


def changed(change: Any) -> list[str]:
    made = notebook.document(CELLS, ["printed\n"] * len(CODE))
    change(made)
    return list(notebook.faults(notebook.text(made).encode(), CELLS))


def code_cell(made: dict[str, Any]) -> dict[str, Any]:
    return next(cell for cell in made["cells"] if cell["cell_type"] == "code")


def prints(text: str) -> Any:
    return lambda made: code_cell(made)["outputs"][0].update(text=[text])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: None, ""),
        (lambda made: made["cells"].pop(), "other cells"),
        (lambda made: code_cell(made).update(source=["print(1)"]), "other cells"),
        (lambda made: code_cell(made).update(execution_count=None), "was not executed"),
        (lambda made: code_cell(made).update(execution_count=2), "was not executed"),
        (lambda made: code_cell(made)["outputs"].append({"output_type": "error"}), "not printed text"),
        (lambda made: made.pop("cells"), "is no notebook"),
        (prints("account 123456789012"), "belongs to an account"),
        (prints("AKIAIOSFODNN7EXAMPLE"), "belongs to an account"),
        (prints("sagemaker-api-key-abc"), "belongs to an account"),
        (prints("/" + "home/me/x"), "belongs to an account"),
        (prints("http://127.0.0.1:8080"), "belongs to an account"),
    ],
)
def test_what_an_executed_notebook_must_not_hold_is_named(change: Any, words: str) -> None:
    found = changed(change)
    assert (found == []) if not words else any(words in fault for fault in found)


def test_what_is_no_json_is_no_notebook() -> None:
    assert list(notebook.faults(b"{", CELLS)) == ["`notebook.ipynb` is no notebook"]


def test_the_committed_notebook_is_the_examples_and_holds_no_trace() -> None:
    data = example.COMMITTED.read_bytes()
    assert list(notebook.faults(data, CELLS)) == []
    assert notebook.text(json.loads(data)).encode() == data
