"""`strongroom package build` with the stages a vendor runs: a tiny GGUF becomes a package that serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from container.model import parts
from container.model.convert import convert_gguf
from model_package.opener import open_package
from tests.infra.test_keys import Shell
from tests.model.test_convert import tiny_model, write_gguf
from tests.model_package import making
from tests.sagemaker_entry.sealed_model import RealServer

TOKENS = 64


@pytest.mark.timeout(1800)  # four processes that import torch, on a machine that may be busy
def test_a_tiny_gguf_is_converted_quantized_measured_sealed_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(monkeypatch, capfd)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = shell("key", "make", "--kind", "signing", "--out", tmp_path / "vendor", "--json").result["public"]
    shell("key", "make", "--kind", "data", "--out", tmp_path / "data", "--json")
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    (tmp_path / "LICENSE").write_text("Do as you like.\n")
    done = shell(
        "package", "build", gguf, "--out", tmp_path / "package", "--name", "tiny", "--version", "1.0",
        "--key", f"file:{tmp_path / 'data'}", "--signing-key", tmp_path / "vendor", "--licence", "MIT",
        "--quantize", "int8-block", "--quality-tokens", TOKENS, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    trust = making.Trust(
        making.Owner.VENDOR,
        making.Roots(vendor=(making.Root(bytes.fromhex(root.removeprefix("ed25519:"))),)),
        2**40,
    )
    key = bytearray.fromhex((tmp_path / "data").read_text())
    with open_package(tmp_path / "package", trust) as package, package.unlock(key) as contents:
        names = set(contents.names())
        report = json.loads(contents.file("quality.json") or b"")
        card = (contents.file("README.md") or b"").decode()
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "LICENSE"}
    assert wanted <= names
    assert any(name.startswith("parts/") and name.endswith(".safetensors") for name in names)
    assert [row["variant"] for row in report["rows"]] == ["none", "int8-block"]
    measured = report["rows"][1]["quality"]
    assert measured["kl_mean"] > 0 and f"{measured['kl_mean']:.5f}" in card
    assert report["architecture"] == "LlamaForCausalLM" and report["positions"] > 0
    convert_gguf(gguf, tmp_path / "plain", lambda phrase, share: None)
    parts.make(tmp_path / "plain", 1, "int8-block")
    sealed = {"STRONGROOM_KEY": f"file:{tmp_path / 'data'}", "STRONGROOM_VENDOR_ROOTS": root}
    sealed["STRONGROOM_ALLOW_PLAINTEXT"] = "off"
    answers = served(tmp_path / "a", tmp_path / "package", **sealed)
    assert len(set(answers)) == len(answers)
    assert answers == served(tmp_path / "b", tmp_path / "plain")


def served(directory: Path, model: Path, **environment: str) -> list[bytes]:
    """Return what an endpoint over `model` answers, started by its ready decoder."""
    told = {"STRONGROOM_MODEL": str(model), "STRONGROOM_SERVED_NAME": "tiny"}
    with RealServer(directory, **told, **environment) as server:
        assert "made ready beforehand" in server.log
        return server.answers()
