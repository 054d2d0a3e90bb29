# ruff: noqa: E501 (a template's line ends are part of it)
"""Chat templates of the ways of writing a chat that are in use, written for these tests.

None is copied: each behaves as the published template of the family that it is named after (its layout, its special tokens,
what it refuses), in our own words. {% generation %} stands where the assistant speaks; `without_marks` takes it out.
"""

import re

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Qwen2.5: ChatML, a default system prompt, tools as JSON in it, calls and tool results as tagged text
QWEN25 = """{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'You are helpful.') }}
{{- '\\n\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen3: the thoughts of all turns but those after the last question are dropped
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- generation %}
{%- if loop.index0 > ns.last %}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- said + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Llama 3: BOS, a header for each turn, contents trimmed
LLAMA3 = """{{- bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Mistral's: no generation prompt, turns must alternate
MISTRAL = """{{- bos_token }}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate: user, assistant, ...') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""

# Llama 2: as Mistral's, the system prompt inside the first question, BOS before each
LLAMA2 = """{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- set head = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if loop.first and messages[0].role == 'system' else '' %}
{{- bos_token + '[INST] ' + head + m.content.strip() + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""

# Gemma: the assistant is called model, no system prompt
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- set name = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + name + '\\n' }}
{%- if name == 'model' %}{% generation %}{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Phi-3: the role makes the name of a special token
PHI3 = """{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Zephyr: a role on a line, each turn ended by EOS
ZEPHYR = """{% for m in messages %}
{{ '<|' ~ m.role ~ '|>' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}
{% else %}{{ m.content + eos_token }}
{% endif %}

{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}"""

# SmolLM3: today's date in the system prompt, a macro, {% break %}
SMOLLM3 = """{%- macro head(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}
{{- head('system') + 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}
{%- for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% break %}{% endif %}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- for m in messages if m.role != 'system' %}
{{- head(m.role) }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content.lstrip('\\n') + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "llama2": LLAMA2,
             "gemma": GEMMA, "phi3": PHI3, "zephyr": ZEPHYR, "smollm3": SMOLLM3}  # fmt: skip
NO_SYSTEM = ("mistral", "gemma")  # they refuse a system prompt
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
           "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]  # fmt: skip
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added tokens that are not special


def without_marks(template: str) -> str:
    """The template without {% generation %}; a comment in its place keeps the same line ends and spaces."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)
