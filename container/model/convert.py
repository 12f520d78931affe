"""A GGUF file becomes a checkpoint directory that every later stage reads.

Owns: the conversion (weights, configuration, tokenizer, chat template, end-of-sequence ids), done once.
Must not know: what serves the result, sealing, any particular model.
Invariant: `out_dir` is absent or complete and on disk; a crash leaves only a temporary directory beside it.

    python -m container.model.convert --gguf FILE --out DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

EXIT_USAGE: Final = 2
CONVERTER_VERSION: Final = 2  # part of cache keys: raise it when the output for the same file changes

Progress = Callable[[str, float], None]  # (what is being done, share done in [0, 1])

CONTROL: Final = 3  # `tokenizer.ggml.token_type` of a token that text never spells

# Tokens that end a turn or a text. A GGUF names one of them as end of sequence, often the one its base model
# used, while the chat template closes turns with another; llama.cpp stops at all of them by name, too.
END_TOKENS: Final = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|END_OF_TURN_TOKEN|>",
        "</s>",
        "<eos>",
    }
)
END_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")

# `tokenizer.ggml.pre` of byte-level BPE files, by how text is cut before merging. transformers 5.23 knows the
# third group itself and silently cuts every other file like GPT-2, which is wrong for the first.
DIGIT_SPLITS: Final = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
GPT2_SPLITS: Final = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "exaone4", "mellum"})
KNOWN_SPLITS: Final = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx", "tekken", "qwen2", "deepseek-r1-qwen"}
    | {"qwen35", "gpt-4o", "llama4", "lfm2"}
)

# Files in which a token that is whole in the vocabulary is taken before any merge (llama.cpp: ignore_merges).
WHOLE_WORDS: Final = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})

# How tensors that are not blocks are stored, the type that stands for a mixed file first.
PLAIN_DTYPES: Final = {
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.F32: torch.float32,
}


class ConversionError(ValueError):
    """The file cannot become a checkpoint that behaves as the file says."""


def convert_gguf(gguf_path: Path, out_dir: Path, progress: Progress) -> None:
    """Write the checkpoint of `gguf_path` into the new directory `out_dir`.

    Block-quantized weights become float16, others keep their type: see `_storage_dtype`. Raises
    FileExistsError when `out_dir` exists, ConversionError when the file states something that would not
    survive, OSError from the disk; nothing is left behind then.
    """
    if out_dir.exists():
        raise FileExistsError(f"`{out_dir.name}` already exists")
    progress("reading metadata", 0.0)
    header = _read_header(gguf_path)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        with _quiet():
            progress("building the tokenizer", 0.1)
            _write_tokenizer(gguf_path, header.metadata, partial)
            progress("unpacking weights", 0.3)
            _write_weights(gguf_path, header, partial)
        progress("flushing to disk", 0.9)
        _flush(partial)
        partial.chmod(0o755)  # mkdtemp made it private to this user
        partial.rename(out_dir)
        _flush_entry(out_dir.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    progress("done", 1.0)


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a generation: those the file names, then its control tokens in END_TOKENS."""
    named = [metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    known = [i for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if _ends(text, kind)]
    return list(dict.fromkeys([int(i) for i in named if i is not None] + known))


def _ends(text: str, kind: int) -> bool:
    return kind == CONTROL and text in END_TOKENS


class _Header(NamedTuple):
    """What this module decides on: metadata by key, and the storage types that occur among the tensors."""

    metadata: dict[str, Any]
    types: frozenset[GGMLQuantizationType]


def _read_header(gguf_path: Path) -> _Header:
    reader = GGUFReader(gguf_path)
    wanted = ["general.architecture", *(f"tokenizer.ggml.{key}" for key in END_KEYS)]
    wanted += [f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type")]
    fields = ((key, reader.get_field(key)) for key in wanted)
    metadata = {key: field.contents() for key, field in fields if field is not None}
    return _Header(metadata, frozenset(tensor.tensor_type for tensor in reader.tensors))


def _storage_dtype(types: frozenset[GGMLQuantizationType]) -> torch.dtype:
    """Return the type to store weights in.

    Blocks unpack to scale * integer + offset, which no 16-bit type holds exactly. Measured on SmolLM2-135M
    Q4_1 against float32 over 433 tokens of chat: float16 keeps every argmax (KL 2.7e-6 per token), bfloat16
    changes one of six greedy answers (KL 1.0e-4), and float32 doubles disk, sealing and reading. A file
    without blocks keeps its own type, which is exact.
    """
    if not types <= PLAIN_DTYPES.keys():
        return torch.float16
    for kind, dtype in PLAIN_DTYPES.items():
        if kind in types:
            return dtype
    raise ConversionError("the file holds no tensors")


def _write_tokenizer(gguf_path: Path, metadata: Mapping[str, Any], out_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        _set_splits(tokenizer.backend_tokenizer, metadata.get("tokenizer.ggml.pre"))
    tokenizer.save_pretrained(out_dir, save_jinja_files=False)
    # How the tokenizer was found says nothing about the checkpoint.
    _edit_json(out_dir / "tokenizer_config.json", without=("is_local", "local_files_only"))


def _set_splits(backend: Any, kind: str | None) -> None:
    """Cut text before merging as the file declares; raises ConversionError for an unknown declaration."""
    if kind in DIGIT_SPLITS:
        # llama.cpp cuts at every \p{N} first, then with GPT-2's expression; Digits and ByteLevel do the same.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif kind in GPT2_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif kind not in KNOWN_SPLITS:
        raise ConversionError(f"pre-tokenizer `{kind}` is not known, so text would be cut wrongly")
    if kind in WHOLE_WORDS:
        backend.model.ignore_merges = True


def _write_weights(gguf_path: Path, header: _Header, out_dir: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    dtype = _storage_dtype(header.types)
    model = _load(gguf_path, dtype)
    if dtype == torch.float16 and not all(bool(p.isfinite().all()) for p in model.parameters()):
        model = _load(gguf_path, torch.float32)  # a weight beyond 65504, the largest float16
    model.save_pretrained(out_dir)
    _edit_json(out_dir / "generation_config.json", eos_token_id=end_ids(header.metadata))


def _load(gguf_path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        local_files_only=True,
    )


def _edit_json(path: Path, without: Sequence[str] = (), **values: object) -> None:
    document = json.loads(path.read_text()) | values
    for key in without:
        document.pop(key, None)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the readers' progress bars off the terminal and out of logs; ours is the only one."""
    with Path(os.devnull).open("w") as sink, redirect_stderr(sink):
        yield


def _flush(directory: Path) -> None:
    """Make every file of `directory` readable to all, and force them and the listing to disk."""
    for path in directory.iterdir():
        path.chmod(0o644)  # safetensors writes through a private temporary file
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_entry(directory)


def _flush_entry(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file and print one line of JSON about it; return the exit status."""
    parser = argparse.ArgumentParser(prog="strongroom package build", allow_abbrev=False)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        convert_gguf(options.gguf, options.out, _told)
    except (ConversionError, OSError) as error:
        said = str(error) if isinstance(error, ConversionError) else "the system refused to read or to write"
        print(f"error: {said}", file=sys.stderr)
        return EXIT_USAGE
    except ValueError:  # what the GGUF reader raises for a file that is none
        print("error: the file is not a GGUF that can be read", file=sys.stderr)
        return EXIT_USAGE
    shown = {"folder": str(options.out), "converter": CONVERTER_VERSION}
    print(json.dumps(shown, separators=(",", ":")), flush=True)
    return 0


def _told(phrase: str, share: float) -> None:
    print(f"convert: {phrase} ({share:.0%})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
