"""Chat templates, written to use every construct together, and chats to render with them."""

from __future__ import annotations

from typing import Any

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TEMPLATES = {
    "plain": HEAD + "{{ m.content }}" + TAIL,
    "generation": HEAD + "{% if m.role == 'assistant' %}{% generation %}\n{{ m.content }}\n{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}" + TAIL,
    "generation_scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation_minus": HEAD + "  {%- generation -%}  {{ m.content }}  {%- endgeneration -%}  " + TAIL,
    "continue": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ loop.index }}{{ m.role }}"
    "{% endfor %}",
    "break": "{% for m in messages %}{{ m.role }}{% if loop.index > 1 %}{% break %}{% endif %},{% else %}none"
    "{% endfor %}",
    "strftime": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}\n",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson }}{% endfor %}",
    "tojson_arguments": "{{ messages | tojson(ensure_ascii=True) }}{{ messages | tojson(indent=2) }}"
    "{{ messages | tojson(separators=(',', ':')) }}{{ messages | tojson(indent=1, sort_keys=True) }}"
    "{{ messages | tojson(true, 4, none, true) }}",
    "html": "{{ '<a href=\"x\">&\\'</a>' | tojson }}{{ '<b>' }}{{ '<b>' | e }}{{ messages[0].content | escape }}",
    "tools": "{% if tools is not none %}# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% if documents is none %}no documents{% else %}{{ documents[0].title }}{% endif %}" + HEAD + TAIL,
    "tool_calls": HEAD + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}" + TAIL,
    "none_content": HEAD
    + "{{ m.content is defined }}{{ m.content is none }}{{ 'content' in m }}{{ m.get('x') }}"
    + TAIL,
    "special": "{{ bos_token is defined }}{{ eos_token }}{{ pad_token }}{{ unk_token | default('no unk') }}",
    "thinking": HEAD
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n{% endif %}"
    "{{ m.reasoning_content | default('-') }}|{{ m.thinking | default('-') }}|{{ m.content }}" + TAIL,
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages | reverse %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'user' and not ns.last %}{% set ns.last = m.content %}{% endif %}{% endfor %}"
    "{{ ns.n }}{{ ns.last }}{{ namespace(a=1).a }}{{ namespace({'b': 2}).b }}",
    "macro": "{% macro turn(role, text='') %}<{{ role }}>{{ text }}{{ caller() if caller else '' }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{% call turn(m.role) %}called{% endcall %}{% endfor %}",
    "recursive_macro": "{% macro dump(v) %}{% if v is mapping %}{ {%- for k, x in v.items() %}{{ k }}:{{ dump(x) }};"
    "{% endfor %} }{% elif v is string %}'{{ v }}'{% elif v is iterable %}[{% for x in v %}{{ dump(x) }}{% endfor %}]"
    "{% else %}{{ v }}{% endif %}{% endmacro %}{{ dump(messages) }}",
    "recursive_loop": "{% for m in [[1, [2, 3]], [4]] recursive %}{% if m is iterable %}({{ loop(m) }}){% else %}"
    "{{ m }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "loop": "{% for m in messages if m.role != 'system' %}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.index0 }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{{ loop.previtem.role if loop.previtem }}{{ loop.revindex }}"
    "{% else %}nobody{% endfor %}",
    "trim": "  {% if true %}\n    indented\n  "
    "{% endif %}\n\t{# a comment #}\n  {{ 'x' }}\n{%- if true -%}\n  y\n{%- endif +%}\nz\n\n",
    "lstrip_off": "   {%+ if true %}a{% endif %}\n   {% raw %}{{ raw }}{% endraw %}\n",
    "concat": "{{ 'a' ~ 1 ~ none ~ missing ~ [1, 'b'] ~ messages[0].role }}{{ 'a' + 'b' }}{{ 'ab' * 3 }}{{ 3 * [0] }}"
    "{{ '%s-%03d' % ('x', 7) }}{{ '%05.2f' | format(3.14159) }}{{ '{:>5}|{!r}'.format('x', 'é') }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 1 / 4 }}{{ -3 }}{{ 0.1 + 0.2 }}{{ 2 ** -1 }}{{ true + 1 }}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ 'naïve 雪'[2:-1] }}{{ messages[-1]['role'] }}",
    "strings": "{{ messages[0].content.strip().upper().split(' ') }}"
    "{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}"
    "{{ 'x'.startswith(('x', 'y')) }}{{ 'é'.encode('utf-8') | length }}{{ 'ab'.center(6) }}{{ 'ab' | center(6) }}|",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') "
    "| list | length }}{{ [3, 1, 2] | sort | first }}{{ 'a b' | replace(' ', '_') | title }}{{ 'x\ny' | indent(2) }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1} | items | list }}{{ 'x' | trim | length }}"
    "{{ [1, 2, 3] | batch(2) | list }}"
    "{{ messages | groupby('role') | map('first') | list }}{{ none | default('d', true) }}{{ '3' | int + 1 }}",
    "tests": "{{ 1 is number }}{{ 'a' is string }}{{ messages is sequence }}{{ messages[0] is mapping }}"
    "{{ none is none }}"
    "{{ x is undefined }}{{ 3 is odd }}{{ 1 in [1] }}{{ 'a' is in 'abc' }}{{ true is boolean }}{{ 1.0 is float }}",
    "set_block": "{% set text %}a{{ messages[0].role }}\n{% endset %}{{ text | trim }}{% set a, b = 1, 2 %}{{ b }}"
    "{% with c = 3 %}{{ c }}{% endwith %}{% filter upper %}x{{ a }}{% endfilter %}",
    "dict": "{{ dict(a=1, b=2) | tojson }}{{ range(3) | list }}{{ lipsum is defined }}{{ cycler('a').next() }}"
    "{% set j = joiner(',') %}{{ j() }}a{{ j() }}b",
    "undefined": "{{ missing }}{{ missing | default('d') }}{{ messages[99] }}{{ messages[0].nothing }}.",
    "unicode": "→ 雪 {{ 'é' }} {{ messages[0].content }} \U0001f600\n",
    "newline_at_the_end": "{{ messages[0].role }}\n",
    "qwen_like": "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- set ns = namespace(multi=true, last=messages|length - 1) %}{%- for m in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi and m.role == 'user' and m.content is string "
    "and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.content is string %}{%- set content = m.content %}{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined "
    "and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
}

CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "lookup", "arguments": {"wörd": "<雪> & 'x'", "n": [1, 2.5, None, True]}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "sort é 5 →\n"}],
    "tools": [
        {"role": "system", "content": "Be <brief> & 'kind'.  "},
        {"role": "user", "content": "雪? \U0001f600"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "think\n"},
        {"role": "tool", "content": '{"a": 1}', "name": "lookup"},
        {"role": "assistant", "content": "<think>x</think>\n\nanswer", "reasoning_content": "y", "thinking": None},
        {"role": "user", "content": "  again\t", "extra": {"b": [], "a": {}}},
    ],
    "thinking": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a", "thinking": "t"}],
}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "«x»", "parameters": {"type": "object"}}}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": [TOOL], "enable_thinking": False, "add_generation_prompt": False},
    {"documents": [{"title": "t", "text": "x"}], "bos_token": "<given>", "enable_thinking": True},
)
