"""Chat templates that have a name, written from the public descriptions of their formats."""

from __future__ import annotations

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Each message between <|im_start|>ROLE and <|im_end|>.

Source: OpenAI 2023, "Chat Markup Language", v0.
"""

_ALPACA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- else %}
{{- message['content'] | trim + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}
"""
"""Sections "### Instruction:" and "### Response:"; a system message stands before them as it is.

Source: Taori et al. 2023, "Stanford Alpaca", the prompt without an input.
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Each message after its role between <|start_header_id|> and <|end_header_id|>, and before <|eot_id|>.

Source: Meta 2024, "Llama 3: model cards and prompt formats".
"""

_MISTRAL = """\
{%- set first = namespace(system='') %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set first.system = message['content'] | trim + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + first.system + message['content'] | trim + ' [/INST]' }}
{%- set first.system = '' %}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim + eos_token }}
{%- else %}
{{- raise_exception('mistral has the roles system, user and assistant, and not ' + message['role']) }}
{%- endif %}
{%- endfor %}
"""
"""Users between [INST] and [/INST], a system message before the next user's, assistants up to the end of a sequence.

Source: Mistral AI 2023, model card of Mistral-7B-Instruct-v0.2, "Instruction format".
"""

_EXAONE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}
"""
"""Each message after [|ROLE|]; those of the system and the assistant before [|endofturn|].

Source: LG AI Research 2024, model card of EXAONE-3.0-7.8B-Instruct.
"""

BUILTIN = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
"""By name: those that mergekit has."""
