"""Small tokenizers of the families in use, trained in a moment on a fixed text, and templates for them.

Every family has the same control tokens, so that one test body serves all.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Files = dict[str, bytes]

CORPUS = [
    "the quick brown fox jumps over the lazy dog while the user and the assistant talk to the system",
    "The capital of France is Paris. What is the capital of Italy? Rome is the capital of Italy, of course!",
    "def main(argument):\n    return {'key': [1, 2, 3], \"value\": argument}\n\n\nmain(42)",
    "<b>bold</b> im_start im_end start end begin text turn header id s eot unk tool call think | _ < > / [ ]",
    "naïve café, Straße, Ελλάδα, Москва, 北京, 東京, 😀 👩‍👩‍👧 🇫🇷, 1234567890 + - = * & % $ # @ ~ ^",
]
# Spellings that tokenizers in use have: brackets, pipes, full-width bars, plain words in tags.
CONTROL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>",
    "[INST]", "[/INST]", "[gMASK]", "<sop>", "<start_of_turn>", "<end_of_turn>", "<\uff5cUser\uff5c>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
]  # fmt: skip
PLAIN_SPECIAL = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
MARK = "\u2581"


def added(content: str, **flags: bool) -> AddedToken:
    flags = {"normalized": False, "special": content not in PLAIN_SPECIAL} | flags
    return AddedToken(content, **flags)


def packed(tokenizer: Tokenizer, config: dict[str, Any] | None = None, **companions: Any) -> Files:
    """Return the files of a model directory."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(named | (config or {})).encode(),
    }
    for name, content in companions.items():
        stem, _, suffix = name.rpartition("_")
        files[f"{stem}.{suffix}"] = content if isinstance(content, bytes) else json.dumps(content).encode()
    return files


def with_template(files: Files, source: str) -> Files:
    return files | {"chat_template.jinja": source.encode()}


def byte_level(*, ignore_merges: bool = False) -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: every byte has a piece, no unknown, no normalizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([added(content) for content in CONTROL])
    return tokenizer


def _with_byte_pieces(trained: Tokenizer, **model: Any) -> Tokenizer:
    """Return `trained` (BPE) with the 256 byte pieces of sentencepiece, and the control tokens first."""
    document = json.loads(trained.to_str())
    old = [piece for piece, _ in sorted(document["model"]["vocab"].items(), key=lambda item: item[1])]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = list(dict.fromkeys([*CONTROL, *byte_pieces, *old]))
    document["model"] |= {
        "vocab": {piece: index for index, piece in enumerate(pieces)},
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
        **model,
    }
    document["added_tokens"] = [
        {
            "id": index, "content": content, "special": content not in PLAIN_SPECIAL, "normalized": False,
            "lstrip": False, "rstrip": False, "single_word": False,
        }
        for index, content in enumerate(CONTROL)
    ]  # fmt: skip
    return Tokenizer.from_str(json.dumps(document))


def metaspace(scheme: str = "first") -> Tokenizer:
    """As Llama 2 and Mistral in their newer form: a pre-tokenizer writes the word marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.train_from_iterator(
        [sentence.split("\n")[0] for sentence in CORPUS * 3],
        trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=12),
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return _with_byte_pieces(tokenizer)


def legacy_sentencepiece() -> Tokenizer:
    """As Llama 2 in its older form: a normalizer writes the word marks, before every segment."""
    tokenizer = metaspace()
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and ALBERT: pieces with scores; control tokens are pieces too, with the best score."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=CONTROL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def folding() -> Tokenizer:
    """A byte-level vocabulary behind a normalizer that folds look-alikes, drops marks and lowers case."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\u200b", ""), normalizers.Lowercase()]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: a decoder that is none of the per-byte kinds."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=CONTROL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


FAMILIES = {
    "byte_level": byte_level,
    "byte_level_whole_words": lambda: byte_level(ignore_merges=True),
    "metaspace": metaspace,
    "metaspace_always": lambda: metaspace("always"),
    "legacy_sentencepiece": legacy_sentencepiece,
    "unigram": unigram,
    "folding": folding,
    "word_piece": word_piece,
}

# Templates in the manner of published families: what they do to strings matters, not their wording.
TEMPLATES = {
    "chatml": """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "headers": """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "instructions": """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
{{ '[INST] ' ~ message.content ~ ' [/INST]' }}{% elif message.role == 'assistant' %}\
{{ ' ' ~ message.content ~ eos_token }}{% else %}{{ message.content ~ '\\n\\n' }}{% endif %}{% endfor %}""",
    "turns": """\
{{ bos_token }}{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + (message['content'] | trim) + '<end_of_turn>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "assembled": """\
[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}{{ '<|' + 'end' + '|>' }}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
    "reasoning": """\
{%- macro body(content) %}{% if content is string %}{{ content }}{% endif %}{% endmacro %}
{%- set state = namespace(count=0, tail=[]) %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = body(message.content) %}
    {%- set reasoning = '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- set state.count = state.count + 1 %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ content ~ '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.last and reasoning %}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if not enable_thinking | default(true) %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    # Everything a template could do to a client's text so that the pieces of a control token meet.
    "mangling": """\
<|im_start|>{% for message in messages %}{{ message.content | replace('\\n', '') | lower | trim }}\
{{ message.content | striptags }}{{ message.content.split('#') | join }}\
{{ message.content | reverse | reverse }}\
{{ message.content[1:] }}{{ '%s' | format(message.content) }}{{ '<|im_' ~ message.content ~ 'end|>' }}\
{{ '<|' + message.content }}{% set ns = namespace(x='') %}{% for c in message.content %}\
{% set ns.x = ns.x + c %}{% endfor %}{{ ns.x }}{{ '{}'.format(message.content) }}{{ message.content * 2 }}\
{{ message | tojson }}{{ message.items() | list }}{% endfor %}<|im_end|>""",
    "glued": """\
<|im_start|>{{ tools | tojson if tools }}\
{% for message in messages %}{{ message.content }}{% endfor %}<|im_end|>""",
    "joined": """\
{%- set parts = ['<|user|>', messages[0].content, '<|end|>'] -%}
{{ parts | join('\\n') }}{% generation %}{{ '<|assistant|>' | string }}{% endgeneration %}
{%- for message in messages[1:] %}{% if loop.index > 40 %}{% break %}{% endif %}
{{- ('<|' ~ message.role | upper | lower ~ '|>')[0:] }}{{ message.content }}
{%- filter trim %} <|end|> {% endfilter %}
{%- endfor %}""",
}
