"""Templates that call tools in the manner of published families, and a model for each.

Owns: samples. Must not know: expectations. Nothing here is collected as a test.
"""

from __future__ import annotations

from tokenizers import AddedToken

from container.text.model import TextModel
from tests.text import build

HERMES = """\
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}For each call:
<tool_call>
{"name": <name>, "arguments": <object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' ~ message.role }}
{%- if message.content %}{{- '\\n' ~ message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' ~ call.name ~ '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ message.content | tojson ~ '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{{- message.content ~ '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if loop.last and tools %}{{- '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST]' ~ message.content ~ '[/INST]' }}
{%- elif message.tool_calls %}
CALLS
{{- eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' ~ message.content ~ '[/TOOL_RESULTS]' }}
{%- else %}{{- message.content ~ eos_token }}{%- endif %}
{%- endfor %}"""
_LIST = """\
{{- '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson }}
{{- ', "id": "' ~ call.id ~ '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']' }}"""
_NAMED = """\
{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' ~ call.function.name ~ '[CALL_ID]' ~ call.id ~ '[ARGS]' }}
{{- call.function.arguments | tojson }}
{%- endfor %}"""
MISTRAL = _MISTRAL.replace("CALLS\n", _LIST + "\n")
MISTRAL_NAMED = _MISTRAL.replace("CALLS\n", _NAMED + "\n")
PLAIN = build.TEMPLATES["chatml"]
# Tells of tools, and writes calls in a way nobody can read back.
FOREIGN = """\
{%- for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}
{%- if tools %}{{ tools | tojson }}{%- endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<call {{ call.function.name }}>{%- endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

TEMPLATES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral_named": MISTRAL_NAMED,
    "plain": PLAIN,
    "foreign": FOREIGN,
}
SPECIAL = ("<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")


def files(name: str, *, tokens: bool = True) -> build.Files:
    """Return a model's files; without `tokens` the marks of calls are ordinary text."""
    tokenizer = build.byte_level()
    if tokens:
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return build.with_template(build.packed(tokenizer), TEMPLATES[name])


def load(name: str, *, tokens: bool = True) -> TextModel:
    return TextModel.load(files(name, tokens=tokens))
