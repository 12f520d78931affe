"""The quality report: metrics against closed forms, windows, refusals, the whole command on a tiny model."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from container.model.kv_cache import KVCache
from container.model.kv_limits import KVLimits, LayerShape
from container.model.packed import PackedModel
from container.model.quality import report as reporting
from container.model.quality import text as texts
from container.model.quality.__main__ import main
from container.model.quality.measure import (
    NotNative,
    Quality,
    Row,
    Variant,
    divergence,
    measure,
    open_variant,
    reference_row,
)
from container.model.quality.report import Report
from container.model.quality.text import Text, TextRefused
from tests.model.tiny import VOCABULARY, TinySource, tiny_source

WINDOWS = [[(7 * at + shift) % VOCABULARY for at in range(48)] for shift in (0, 5)]


def tokenizer_json() -> bytes:
    """A tokenizer of single letters, as wide as the tiny models."""
    vocabulary = {chr(ord("0") + index): index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str().encode()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny model on disk, as a vendor has it."""
    return written(tmp_path / "model", tiny_source("llama"))


def written(path: Path, source: TinySource) -> Path:
    path.mkdir()
    config = source.file("config.json")
    assert config is not None
    (path / "config.json").write_bytes(config)
    (path / "tokenizer.json").write_bytes(tokenizer_json())
    save_file({name: tensor.contiguous() for name, tensor in source.tensors()}, path / "model.safetensors")
    return path


def test_divergence_is_the_closed_form_of_two_coins() -> None:
    expected = torch.tensor([[math.log(0.75), math.log(0.25)]])
    found = torch.tensor([[math.log(0.5), math.log(0.5)]])
    exact = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(divergence(expected, found)) == pytest.approx(exact, rel=1e-6)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(divergence(found, expected)) == pytest.approx(reverse, rel=1e-6)


def test_divergence_does_not_depend_on_a_constant_added_or_on_chunks() -> None:
    generator = torch.Generator().manual_seed(3)
    expected, found = torch.randn(2, 150, 40, generator=generator)
    whole = divergence(expected, found)
    assert whole.shape == (150,) and bool((whole > 0).all())
    assert torch.allclose(divergence(expected + 9.0, found - 4.0), whole, rtol=1e-4)
    assert torch.equal(whole[70:71], divergence(expected[70:71], found[70:71]))
    assert float(divergence(expected, expected).abs().max()) < 1e-12


def test_a_variant_that_changes_nothing_shows_no_divergence_and_bf16_shows_a_little() -> None:
    source = tiny_source("llama")
    reference = open_variant(source, Variant("none", dtype="float32"), 48, 1, lambda _: None)
    first = reference_row(reference, WINDOWS, "none")
    rows = list(
        measure(
            source,
            reference,
            [Variant("same", dtype="float32"), Variant("bfloat16", dtype="bfloat16")],
            WINDOWS,
            1,
            lambda _: None,
        )
    )
    assert first.quality is not None
    same, bf16 = (row.quality for row in rows)
    assert same == Quality(96, pytest.approx(first.quality.perplexity), 0.0, 0.0, 1.0)
    assert bf16 is not None and 0 < bf16.kl_mean < 0.01 and bf16.kl_mean < bf16.kl_p99
    assert rows[1].weight_bytes is not None and first.weight_bytes is not None
    assert rows[1].weight_bytes < 0.6 * first.weight_bytes  # position buffers stay in fp32
    assert set(rows[0].decode_speedup or {}) == {1, 8}
    reference.close()


def test_perplexity_is_that_of_the_plain_forward() -> None:
    from tests.model.tiny import reference_model

    reference = open_variant(tiny_source("llama"), Variant("none", dtype="float32"), 48, 1, lambda _: None)
    row = reference_row(reference, WINDOWS[:1], "none")
    tokens = torch.tensor(WINDOWS[:1])
    with torch.inference_mode():
        loss = reference_model("llama")(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert row.quality is not None
    assert row.quality.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
    reference.close()


def test_a_variant_that_cannot_be_opened_is_a_row_with_its_reason() -> None:
    source = tiny_source("llama")
    reference = open_variant(source, Variant("none", dtype="float32"), 48, 1, lambda _: None)
    odd, fp8 = Variant("odd", dtype="float8"), Variant("fp8", quantize="fp8")
    row, needing = measure(source, reference, [odd, fp8], WINDOWS, 1, lambda _: None)
    assert needing.refused is not None and "compute capability" in needing.refused
    assert row.quality is None and row.refused is not None and "`dtype` is `float8`" in row.refused
    assert "not measured: `dtype`" in reporting.table(report_of(row))
    reference.close()


def test_a_model_on_compat_is_not_measured() -> None:
    with pytest.raises(NotNative, match="compat"):
        open_variant(tiny_source("falcon_h1"), Variant("none", dtype="float32"), 48, 1, lambda _: None)


def test_weights_that_two_modules_share_count_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    kv = KVCache([LayerShape(1, 8, 8)], torch.float32, KVLimits(1, 16, 16, 1))
    assert PackedModel(model, kv).weight_bytes == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    assert PackedModel(model, kv).weight_bytes == 8 * 8 * 4


def test_a_model_with_a_short_window_is_measured_in_windows_of_that_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = written(tmp_path / "short", tiny_source("llama", max_position_embeddings=96))
    text = tmp_path / "text"
    text.write_text("0123456789" * 30)
    arguments = ["--model", str(directory), "--out", str(tmp_path / "out"), "--text", str(text)]
    assert main([*arguments, "--variants", "bfloat16", "--tokens", "200"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["quality"]["positions"] == 192


def test_windows_are_the_same_each_time_and_spread_over_the_text() -> None:
    text = Text("t", "".join(chr(ord("0") + at % 40) for at in range(1000)))
    made = texts.windows(text, tokenizer_json(), 200, window_tokens=50)
    assert made == texts.windows(text, tokenizer_json(), 200, window_tokens=50)
    assert [window[0] for window in made] == [0, 250 % 40, 500 % 40, 750 % 40]
    assert all(len(window) == 50 for window in made)
    assert len(texts.windows(text, tokenizer_json(), 10**9, window_tokens=50)) == 20


def test_the_default_text_is_long_english_with_a_fixed_digest_per_release() -> None:
    text = texts.default_text()
    assert len(text.content) > 300_000 and "compound statement" in text.content
    assert text.digest == texts.default_text().digest and len(text.digest) == 64
    assert "CPython 3." in text.name and text.content not in repr(text)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff\xfe", "not UTF-8"), (b"abc", "3 tokens, one window needs 512")]
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(TextRefused, match=reason):
        texts.windows(texts.read_text(path), tokenizer_json(), 512)


def test_a_text_too_large_or_missing_and_a_broken_tokenizer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TextRefused, match="cannot be read"):
        texts.read_text(tmp_path / "none")
    with pytest.raises(TextRefused, match=r"`tokenizer\.json` is not readable"):
        texts.windows(Text("t", "abc"), b"{}", 512)
    monkeypatch.setattr(texts, "MAX_TEXT_BYTES", 2)
    (tmp_path / "text").write_bytes(b"abc")
    with pytest.raises(TextRefused, match="3 bytes, at most 2"):
        texts.read_text(tmp_path / "text")


def report_of(*rows: Row) -> Report:
    return Report(
        architecture="Tiny",
        parameters=1_000_000,
        text="a text",
        text_sha256="ab" * 32,
        window_tokens=48,
        positions=96,
        reference="the unquantized weights computed in float32",
        machine={"cpu": "x", "threads": 1},
        versions={"torch": "2"},
        date="2026-01-01T00:00:00Z",
        command="strongroom package quality",
        rows=rows,
    )


def test_json_table_and_plot_say_the_same(tmp_path: Path) -> None:
    rows = (
        Row("none", Quality(96, 10.0, 0.0, 0.0, 1.0), 4 << 20, 1.0, {1: 1.0, 8: 1.0}),
        Row("int8-block", Quality(96, 10.5, 0.004, 0.02, 0.97), 1 << 20, 1.5, {1: 2.0, 8: 1.25}),
        Row("fp8", refused="no such hardware"),
    )
    paths = reporting.write(report_of(*rows), tmp_path / "made" / "here")
    assert [path.name for path in paths] == ["quality.json", "quality.md", "quality.svg"]
    document = json.loads(paths[0].read_text())
    assert document["schema"] == 1 and len(document["rows"]) == 3
    assert document["rows"][1]["quality"]["kl_mean"] == 0.004
    table = paths[1].read_text()
    assert "| int8-block | 1 | 10.500 | 0.00400 | 0.0200 | 0.970 | 1.50x | 2.00x | 1.25x |" in table
    assert "| fp8 | not measured: no such hardware |" in table
    assert "Hold exactly" not in table
    lossless = Row("int4-block", Quality(96, 10.0, 1e-9, 1e-9, 1.0), 1 << 20, 1.0, {1: 1.0, 8: 1.0})
    assert "Hold exactly the reference's weights: int4-block." in reporting.table(report_of(*rows, lossless))
    assert ET.parse(paths[2]).getroot().tag.endswith("svg")


def test_the_command_writes_a_report_and_prints_its_rows(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("0123456789" * 200)
    arguments = ["--model", str(directory), "--out", str(tmp_path / "out"), "--text", str(text)]
    assert main([*arguments, "--variants", "bfloat16", "--tokens", "512", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert [row["variant"] for row in shown["rows"]] == ["none", "bfloat16"]
    assert shown["rows"][1]["quality"]["positions"] == 512
    document = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert document["text"] == "text" and document["machine"]["threads"] == 1
    assert str(tmp_path) not in document["command"]
    assert printed.err.splitlines() == ["quality: reference", "quality: bfloat16"]


def test_the_command_says_what_the_caller_can_mend(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["--model", str(directory), *out, "--variants", "int3"]) == 2
    assert "`--variants int3` is not a choice\nhint: use some of" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "none"), *out]) == 2
    assert "model directory does not exist" in capsys.readouterr().err
    (directory / "tokenizer.json").unlink()
    assert main(["--model", str(directory), *out]) == 2
    assert "no `tokenizer.json`" in capsys.readouterr().err
