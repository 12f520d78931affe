"""A converted GGUF is the same model and the same tokenizer, and a failed conversion leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from container.model import convert
from container.model.convert import ConversionError, convert_gguf, end_ids
from scripts import demo_model

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>"]
# "12" exists as a merge so that cutting digits apart is visible in the ids; "<think>" is user-defined.
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ 1"]
HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2


def byte_alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def vocabulary() -> list[str]:
    return SPECIALS + byte_alphabet() + [merge.replace(" ", "") for merge in MERGES] + ["<think>"]


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of q and k the way GGUF wants them for rotary embeddings."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        tensors |= {
            f"blk.{i}.attn_norm.weight": layer.input_layernorm.weight,
            f"blk.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
            f"blk.{i}.attn_q.weight": interleave(attention.q_proj.weight, HEADS),
            f"blk.{i}.attn_k.weight": interleave(attention.k_proj.weight, KV_HEADS),
            f"blk.{i}.attn_v.weight": attention.v_proj.weight,
            f"blk.{i}.attn_output.weight": attention.o_proj.weight,
            f"blk.{i}.ffn_gate.weight": mlp.gate_proj.weight,
            f"blk.{i}.ffn_up.weight": mlp.up_proj.weight,
            f"blk.{i}.ffn_down.weight": mlp.down_proj.weight,
        }
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    pre: str = "smollm",
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(vocabulary()) - len(SPECIALS) - 1) + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in gguf_tensors(model).items():
        data = tensor.numpy().astype(np.float32)
        stored = GGMLQuantizationType.F32 if data.ndim == 1 else kind
        if stored == GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert_tiny(tmp_path: Path, **options: Any) -> Path:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model(), **options)
    convert_gguf(source, tmp_path / "out", lambda stage, done: None)
    return tmp_path / "out"


def load_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_tiny(tmp_path_factory.mktemp("converted"))


def test_float32_weights_survive_bit_for_bit(converted: Path) -> None:
    expected, model = tiny_model().state_dict(), load_model(converted)
    assert json.loads((converted / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_the_converted_model_gives_the_logits_of_the_original(converted: Path) -> None:
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load_model(converted)(tokens).logits, tiny_model()(tokens).logits)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (GGMLQuantizationType.Q4_1, "float16"),
        (GGMLQuantizationType.Q8_0, "float16"),
        (GGMLQuantizationType.F16, "float16"),
        (GGMLQuantizationType.BF16, "bfloat16"),
    ],
)
def test_blocks_become_float16_and_plain_weights_keep_their_type(
    tmp_path: Path, kind: GGMLQuantizationType, dtype: str
) -> None:
    out = convert_tiny(tmp_path, kind=kind)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    stored = gguf_tensors(tiny_model())["token_embd.weight"].numpy()
    unpacked = torch.from_numpy(gguf.dequantize(gguf.quantize(stored, kind), kind))
    weight = load_model(out).model.embed_tokens.weight
    assert torch.equal(weight, unpacked.to(getattr(torch, dtype)).float())


def test_weights_beyond_float16_stay_float32(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    source = write_gguf(tmp_path / "tiny.gguf", model, GGMLQuantizationType.Q8_0)
    convert_gguf(source, tmp_path / "out", lambda stage, done: None)
    assert load_model(tmp_path / "out").model.norm.weight[3] == 1e6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_every_token_has_the_id_the_file_gives_it(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(list(range(len(vocabulary())))) == vocabulary()
    assert len(tokenizer) == len(vocabulary())


def test_control_and_user_tokens_are_single_ids_with_the_flags_of_the_file(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    for i, text in enumerate(SPECIALS):
        assert tokenizer.encode(text, add_special_tokens=False) == [i]
        assert tokenizer.added_tokens_decoder[i].special
    think = len(vocabulary()) - 1
    assert tokenizer.encode("<think>", add_special_tokens=False) == [think]
    assert not tokenizer.added_tokens_decoder[think].special


def test_smollm_cuts_digits_one_by_one(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert tokenizer.tokenize("hello 12") == ["hello", "Ġ", "1", "2"]


def test_gpt2_keeps_digits_together(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(convert_tiny(tmp_path, pre="gpt-2"), local_files_only=True)
    assert tokenizer.tokenize("hello 12,12") == ["hello", "Ġ", "12", ",", "12"]


def test_whole_words_come_before_merges_where_the_file_says_so(tmp_path: Path) -> None:
    out = convert_tiny(tmp_path, pre="llama-bpe")
    assert json.loads((out / "tokenizer.json").read_text())["model"]["ignore_merges"]


def test_text_survives_encoding_and_decoding(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    for text in ("hello world", " leading", "naïve 漢字 🙂\n\ttab", "a  b   c", "don't. stop , now !"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_put_before_text(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert tokenizer.tokenize("hello") == ["hello"]
    assert tokenizer.encode("hello") == [vocabulary().index("hello")]


def test_the_chat_template_and_special_names_are_kept(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_generation_stops_at_every_end_token_of_the_file(converted: Path) -> None:
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_end_ids_name_each_id_once_and_only_control_tokens_count() -> None:
    tokens = ["</s>", "<|eot_id|>", "<|im_end|>", "x"]
    metadata = {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 1,
        "tokenizer.ggml.eom_token_id": 3,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 1, 3],
    }
    assert end_ids(metadata) == [1, 3, 0]
    assert end_ids({}) == []


def test_no_machine_path_is_written(converted: Path) -> None:
    for path in converted.glob("*.json"):
        assert str(converted.parent) not in path.read_text()


def test_an_unknown_pre_tokenizer_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model(), pre="from-the-future")
    with pytest.raises(ConversionError, match="from-the-future"):
        convert_gguf(source, tmp_path / "out", lambda stage, done: None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())

    def fail(directory: Path) -> None:
        assert (directory / "model.safetensors").exists()
        raise OSError("disk full")

    monkeypatch.setattr(convert, "_flush", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_gguf(source, tmp_path / "out", lambda stage, done: None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_existing_directory_is_not_touched(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        convert_gguf(source, tmp_path / "out", lambda stage, done: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_grows_to_one_and_the_readers_are_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    seen: list[float] = []
    convert_gguf(source, tmp_path / "out", lambda stage, done: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_files_are_readable_by_the_serving_user(converted: Path) -> None:
    assert converted.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in converted.iterdir())


def test_the_cache_converts_once_per_file_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    monkeypatch.setattr(demo_model, "find_demo_gguf", lambda: source)
    stages: list[str] = []
    first = demo_model.ensure_checkpoint(tmp_path / "cache", lambda stage, done: stages.append(stage))
    assert stages
    stages.clear()
    assert demo_model.ensure_checkpoint(tmp_path / "cache", lambda s, d: stages.append(s)) == first
    assert stages == []
    source.unlink()
    write_gguf(source, tiny_model(seed=1))
    assert demo_model.ensure_checkpoint(tmp_path / "cache", lambda s, d: None) != first


def test_a_missing_demo_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="hint: "):
        demo_model.find_demo_gguf()


@pytest.mark.real_model
def test_the_demo_model_answers_and_its_tokenizer_follows_the_file(demo_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint, local_files_only=True)
    field = gguf.GGUFReader(demo_model.find_demo_gguf()).get_field("tokenizer.ggml.tokens")
    assert field is not None
    tokens = field.contents()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    # ids of the model's published tokenizer
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = load_model(demo_checkpoint).generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_the_command_says_where_the_checkpoint_lies_or_what_was_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_gguf(tmp_path / "tiny.gguf", tiny_model()), tmp_path / "out"
    assert convert.main([f"--gguf={source}", f"--out={out}"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"folder": str(out), "converter": convert.CONVERTER_VERSION}
    assert captured.err.splitlines()[-1] == "convert: done (100%)"
    assert (out / "model.safetensors").is_file()
    (tmp_path / "no.gguf").write_bytes(b"PK\3\4 something else")
    for given in (source, tmp_path / "no.gguf", tmp_path / "missing.gguf"):
        where = out if given == source else tmp_path / "other"
        assert convert.main([f"--gguf={given}", f"--out={where}"]) == convert.EXIT_USAGE
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "other").exists()
