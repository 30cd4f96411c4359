"""Chat templates: constructs that real ones use are rendered, and one call cannot make a huge text."""

from __future__ import annotations

from typing import Any

import pytest

from rbe_gpu.models.chat import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 2 + 2? "},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, messages: list[Any] = MESSAGES) -> str:
    return ChatTemplate(source).render(messages, SPECIAL)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("namespace(context='a', obj='b', self='c').context", "a"),
        ("dict(context=1, obj=2, self=3)", "{'context': 1, 'obj': 2, 'self': 3}"),
        ("'**{}**'.format('b')", "**b**"),
        ("'{:>4}|{:.2f}|{x[0]!r:<5}|'.format(1, 2.0, x=['y'])", "   1|2.00|'y'  |"),
        ("""'{{"a": {}}}'.format(1)""", '{"a": 1}'),
        ("'{} of 32768'.format(1)", "1 of 32768"),
        ("'* %s' % 'x'", "* x"),
        ("'100%% * %s' % 'x'", "100% * x"),
        ("'%d tokens of 32768' % 3", "3 tokens of 32768"),
        ("'%(a)s (of) 32768 (x) * %(a)5s' % {'a': 'b'}", "b (of) 32768 (x) *     b"),
        ("'%-4s|%05.1f' % ('a', 2)", "a   |002.0"),
        ("'* %s, %s'|format('a', 1)", "* a, 1"),
        ("'%(a)s'|format(a='b')", "b"),
        ("[1, 2, 3]|batch(2)|list", "[[1, 2], [3]]"),
        ("[1, 2, 3]|batch(2, 0)|list", "[[1, 2], [3, 0]]"),
        ("[1, 2, 3]|slice(2)|list", "[[1, 2], [3]]"),
        ("{'a': [1]}|tojson(indent=4)", '{\n    "a": [\n        1\n    ]\n}'),
        ("{'a': 1}|tojson(indent='  ')", '{\n  "a": 1\n}'),
        ("['\u00e9']|tojson(ensure_ascii=False)", '["\u00e9"]'),
        ("['\u00e9']|tojson(ensure_ascii=True)", '["\\u00e9"]'),
        ("{'b': 1, 'a': 2}|tojson(separators=(',', ':'), sort_keys=true)", '{"a":2,"b":1}'),
        ("'a\nb'|indent(2)", "a\n  b"),
        ("'a\nb'|indent('> ', true)", "> a\n> b"),
        ("'a-b-c'.replace('-', '+')", "a+b+c"),
        ("'a-b-c'.replace('-', '+', 1)", "a+b-c"),
        ("'a-b-c'|replace('-', '+')", "a+b+c"),
        ("'a-b-c'|replace('-', '+', 1)", "a+b-c"),
        ("(1212|replace(1, 3))", "3232"),
        ("('x' * 200000 ~ 'y').replace('y', 'three')|length", "200005"),
        ("', '.join(['a', 'b'])", "a, b"),
        ("['a', 'b']|join(', ')", "a, b"),
        ("'=' * 20", "=" * 20),
        ("'a b'.split(' ')[-1].strip()|upper|trim", "B"),
        ("'a' if 7 % 2 and 2 ** 10 == 1024 else 'b'", "a"),
        ("strftime_now('%Y') >= '2024'", "True"),
        ("strftime_now('%d %b %Y')|length", "11"),
    ],
)
def test_expressions(expression: str, text: str) -> None:
    assert render(f"{{{{ {expression} }}}}") == text


def test_names_of_arguments() -> None:
    """Those of a macro are the template's own."""
    source = "{% macro f(obj, context='b') %}{{ obj ~ context }}{% endmacro %}"
    assert render(source + "{{ f(obj='a') }} {{ f('x', context='y') }}") == "ab xy"


def test_a_long_message_in_variables_of_a_loop() -> None:
    """Jinja hands those variables to every call in the loop, not as arguments of the template."""
    source = (
        "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{% set a = m.content %}{% set b = a|trim %}"
        "{% for i in range(200) %}{% set c = a %}{{ f(i) }}{% endfor %}{{ b }}{% endfor %}"
    )
    message = {"role": "user", "content": "x" * 450_000}
    digits = "".join(map(str, range(200)))
    assert render(source, [message]) == digits + message["content"]


#: what templates of these families do, each with its text of MESSAGES
FAMILIES = {
    "Llama 3": (
        """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "[system, " ~ date_string|length ~ "] " + system + "\\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{%- for message in messages %}
    {{- '[' + message['role'] + '] ' + message['content'] | trim + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}""",
        "<s>[system, 11] Be brief.\n[user] What is 2 + 2?\n[assistant] <think>\nEasy.\n</think>\n\n4\n"
        "[user] And 3 + 3?\n[assistant] ",
    ),
    "Qwen3": (
        """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
            and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set reason = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}{%- set content = reason + content %}{%- endif %}
    {%- endif %}
    {{- '[' + message.role + ']\\n' + content }}
    {%- if message.tool_calls %}{{- message.tool_calls[0].arguments | tojson }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}""",
        "[system]\nBe brief.\n[user]\n What is 2 + 2? \n[assistant]\n4\n[user]\nAnd 3 + 3?\n",
    ),
    "Gemma 3": (
        """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '[' + role + ']\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[model]\n' }}{%- endif -%}""",
        "<s>[user]\nBe brief.\n\nWhat is 2 + 2?\n[model]\n<think>\nEasy.\n</think>\n\n4\n"
        "[user]\nAnd 3 + 3?\n[model]\n",
    ),
    "SmolLM3": (
        """{# defaults #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}
    {%- set own = messages[0].content.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "[system] " ~ (strftime_now("%d %B %Y")|length > 10) ~ " " ~ mode ~ " " ~ own ~ "\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "system" -%}{%- continue -%}{%- endif -%}
    {%- if message.role == "user" -%}
        {{ "[" + message.role + "] " + content|trim + "\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {{- "[assistant] " + content.split("</think>")[-1].lstrip("\\n") + "\\n" }}
        {%- endgeneration %}
    {%- endif -%}
{%- endfor -%}""",
        "[system] True /think Be brief.\n[user] What is 2 + 2?\n[assistant] 4\n[user] And 3 + 3?\n",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    source, text = FAMILIES[family]
    assert render(source) == text


@pytest.mark.parametrize(
    "expression",
    [
        "('a' * 3000).replace('a', 'a' * 3000, 3000)",
        "('a' * 3000)|replace('a', 'a' * 3000)",
        "('a' * 3000)|replace('a', 'a' * 3000, 3000)",
        "('a' * 3000)|replace('', 'a' * 3000)",
        "(('<' * 3000)|safe).replace('&lt;'|safe, 'a' * 3000)",
        "'a'.encode().ljust(10**7)",
        "'%10000000d'.encode() % 1",
        "('a'.encode() * 10000) * 10000",
        "(1).to_bytes(10**7, 'big')",
        "('{:>9999}' * 100).format(*range(100))",
        "('%9999d' * 100) % (1, 2)",
        "('%(a)9999d' * 100) % {'a': 1}",
        "'%(a(b))99999d' % {'a(b)': 1}",
        "'%(a%%)99999d' % {'a%%': 1}",
        "'%5%%99999d' % 1",
        "'%(a%)99999d' % {'a%': 1}",
        "'%*d %%(' % (10**7, 1)",
        "'%.99999f' % 1",
        "'%*d' % (10**7, 1)",
        "'%.*f' % (10**7, 1)",
        "'%10000000d'|format(1)",
        "'{:{}}'.format(1, 10**7)",
        "'{{{:>99999}'.format(1)",
        "'{:>10000000}'.format(1)",
        "'a\nb'|indent('\n' * 9, blank=true)",
        "'a\nb'|indent('\r' * 9, blank=true)",
        "'a\nb'|indent('a' * 101)",
        "[1]|tojson(indent='a' * 101)",
        "[1]|tojson(indent='\n')",
        "[1]|tojson(separators=('a' * 101, ':'))",
        "[1]|batch(10**9, 0)|list",
        "[1]|slice(10**9)|list",
    ],
)
def test_one_call_makes_no_huge_text(expression: str) -> None:
    with pytest.raises(ValueError, match=r"^the chat template: \S+ of too large values$"):
        render(f"{{{{ ({expression})|length }}}}")


@pytest.mark.parametrize("expression", ["a % 1", "a * 2", "2 * a"])
def test_bytes_of_a_message(expression: str) -> None:
    """A caller may add keys to a message; no template makes bytes of its own."""
    message = {"role": "user", "content": "x", "raw": b"%d"}
    with pytest.raises(ValueError, match=r"^the chat template: [%*] with bytes$"):
        render(f"{{{{ {expression.replace('a', 'messages[0].raw')} }}}}", [message])
    with pytest.raises(ValueError, match=r"^the chat template: ljust of too large values$"):
        render("{{ messages[0].raw.ljust(10**7) }}", [message])
