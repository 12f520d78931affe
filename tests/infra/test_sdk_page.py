"""The page on the SageMaker SDK is a run's, of the version that is pinned, and the examples are isolated."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from tests.infra.sdk import __main__ as sdk

EXAMPLE = sdk.ROOT / "infra" / "examples" / "sdk_v3.py"
RUN = {
    "rows": [{"example": "a", "ok": True, "told": "x"}, {"example": "b", "ok": False, "told": "y"}],
    "versions": {"sagemaker-core": "1"},
}


def titles() -> list[str]:
    """Return the examples' names without importing the SDK."""
    tree = ast.parse((sdk.ROOT / "tests" / "infra" / "sdk" / "examples.py").read_text(encoding="utf-8"))
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "EXAMPLES"
    ]
    assert isinstance(table, ast.Dict)
    return [ast.literal_eval(key) for key in table.keys if key is not None]


def test_the_committed_page_is_a_run_in_which_every_example_passed() -> None:
    text = sdk.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (passed|FAILED) \|", text, re.M)
    assert rows == [(title, "passed") for title in ["import", *titles()]]
    assert re.search(r"^20\d\d-\d\d-\d\d: ", text, re.M)
    assert text.startswith(sdk.HEAD) and text.endswith(sdk.TAIL)


def test_the_page_is_of_the_version_that_is_pinned_and_the_extra_takes_it() -> None:
    name, _, version = sdk.PINNED.partition("==")
    assert f"{name} {version}" in sdk.PAGE.read_text(encoding="utf-8")
    project = tomllib.loads((sdk.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extra,) = project["project"]["optional-dependencies"]["sdk"]
    low, high = re.findall(r"\d+", extra)[0:3:2]
    assert extra.startswith(name) and int(low) <= int(version.split(".")[0]) < int(high)


def test_a_failed_example_shows_as_such() -> None:
    made = sdk.page(RUN, "2026-01-01")
    assert "| a | passed | x |" in made and "| b | FAILED | y |" in made
    assert "2026-01-01: sagemaker-core 1." in made


def test_the_examples_import_nothing_of_ours_and_every_model_is_isolated() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    tree = ast.parse(text)
    roots = {
        node.module.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert roots == {"__future__", "dataclasses", "typing", "sagemaker"}
    made = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Model.create"
    ]
    assert made
    for call in made:
        named = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert named["enable_network_isolation"] == "True" and "vpc_config" in named


@pytest.mark.parametrize("path", sorted((sdk.ROOT / "infra").rglob("*.py")), ids=lambda path: path.name)
def test_no_file_of_ours_but_the_examples_imports_the_sdk(path: object) -> None:
    text = path.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    if path != EXAMPLE:
        assert not re.search(r"^\s*(from|import) (sagemaker\b(?!_)|infra\.examples)", text, re.M)
