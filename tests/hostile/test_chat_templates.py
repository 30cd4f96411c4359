"""Chat templates that would take much memory or time, and that the bounds change nothing else of what Jinja does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import jinja2.sandbox
import pytest

from rbe_gpu.models import chat_environment
from rbe_gpu.models.chat import ChatTemplate

MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?", "more": [1, {"a": "b"}]},
    {"role": "assistant", "content": "4\n5"},
]
MEMORY = 128 << 10  # kilobytes
SECONDS = 20.0  # of processor time, compiled and rendered: at most 2.3 on one core beside other work
VALUES = {
    "text": "{% set text = 'x' * 1000000 %}",
    "words": "{% set words = 'x ' * 500000 %}",
    "list": "{% set list = range(100000)|list %}",
    "bits": "{% set bits = 2 ** 6500 %}",
    "numbers": "{% set numbers = range(100000) %}",
    # of integers with equal hashes
    "equal": "{% set equal %}{% for i in range(1, 20000) %}{{ i * (2 ** 61 - 1) }} {% endfor %}{% endset %}",
    "ns": "{% set ns = namespace(a='x', b=[1], n=10) %}",
}


def render(source: str) -> str:
    return ChatTemplate(source).render(MESSAGES, {"bos_token": "<s>", "eos_token": "</s>"})


#: renders the templates of standard input; of each what came out, kilobytes of memory at most until then, and
#: seconds of processor time
_PROCESS = """
import json, resource, sys, time
from tests.hostile.test_chat_templates import render
render("{{ [1]|map('string')|join }}")
for source in json.load(sys.stdin):
    start = time.process_time()
    try:
        made = render(source)[:100]
    except ValueError as error:
        made = str(error)
    seconds = time.process_time() - start
    print(json.dumps([made, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, seconds]), flush=True)
"""


def bounded(sources: list[str]) -> list[str]:
    """The texts or messages of renderings, whose memory and time are checked."""
    sources = ["{{ 1 }}"] + [
        "".join(value for name, value in VALUES.items() if name in source) + source for source in sources
    ]
    run = subprocess.run(
        [sys.executable, "-c", _PROCESS],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == len(sources), (sources[len(lines)], run.stderr[-500:])
    least = lines[0][1]
    for (made, peak, seconds), source in zip(lines, sources, strict=True):
        assert seconds < SECONDS, f"{seconds} s: {source}"
        assert peak - least < MEMORY, f"{(peak - least) >> 10} MB: {source}"
        assert "\n" not in made or not made.startswith("the chat template"), source
    return [made for made, *_ in lines[1:]]


LOOP = "{% for i in range(100000) %}"


#: by what they would take, each refused
REFUSED = {
    "memory": [
        # texts that are joined or put one behind another
        "{{ ([text] * 1000)|join }}",
        "{{ ''.join([text] * 1000) }}",
        "{{ text.join(list|map('string')) }}",
        "{{ (list|map('string'))|join(text) }}",
        "{{ text ~ text ~ text ~ text ~ text }}",
        LOOP + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        LOOP + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set x %}{% for i in range(1000) %}{{ text }}{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(1000) %}{{ text }}{% endfor %}{% endmacro %}{% set x = f() %}",
        "{% filter upper %}{% for i in range(1000) %}{{ text }}{% endfor %}{% endfilter %}",
        # values that a format holds several times
        "{{ ('{0}' * 1000).format(text) }}",
        "{{ ('{a[b]}' * 1000).format(a={'b': text}) }}",
        "{{ ('%(a)s' * 1000) % {'a': text} }}",
        "{{ ('%(a)s' * 1000)|format(a=text) }}",
        # lists of lists, and values that hold themselves
        "{{ [[[text] * 100] * 100] * 100 }}",
        "{{ {}.fromkeys(list, text) }}",
        LOOP + "{% set ns.b = [ns.b, ns.b] %}{% endfor %}",
        LOOP + "{% set ns.b = ns.b + ns.b %}{% endfor %}",
        LOOP + "{% set ns.b = {'a': ns.b, 'b': ns.b} %}{% endfor %}",
        "{% set x = [ns] * 1000 %}{% set ns.a = text %}{{ x }}",
        "{% set ns.a = ns %}{{ ns }}",
        "{{ list|tojson(indent=100) }}",
        "{{ list|tojson(separators=('x' * 99, ':')) }}",
        "{{ ('a\n' * 500000)|indent(100) }}",
        "{{ words.split() }}",
        "{{ (list|batch(1)|list)|sum(start=[]) }}",
        "{% macro f() %}"
        + LOOP
        + "{% if true %}x{% endif %}" * 500
        + "{% endfor %}{% endmacro %}{% set x = f() %}",
        "{% set x %}" + LOOP + "{% if true %}x{% endif %}" * 500 + "{% endfor %}{% endset %}",
        "{{ ('{0}' * 400).format({'a': text}.values()) }}",
        "{{ ('{0}' * 400).format({'a': text}.items()) }}",
        "{{ (('x' * 300000)|safe).replace('x', ['y' * 3000]) }}",
        "{{ numbers|batch(1)|sum(start=[]) }}",
        # numbers
        "{{ range(bits, bits + 100000)|list }}",
        "{{ 1|round(1000000000) }}",
        "{{ 1|round(-1000000000) }}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
        "{{ list|map('round', 1000000000)|list }}",
        "{{ 10 ** 100000 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ bits * bits * bits }}",
        LOOP + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
        LOOP + "{% set ns.n = ns.n ** 64 %}{% endfor %}",
        "{{ ('f' * 1000000)|int(base=16) }}",
        "{{ strftime_now('%Y' * 100000) }}",
    ],
    "time": [
        LOOP + LOOP + "{% endfor %}{% endfor %}",
        LOOP + LOOP.replace("%}", "if false %}") + "{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for x in messages recursive %}{% if loop.depth < 40 %}{{ loop(messages) }}{% endif %}{% endfor %}",
        LOOP + "{{ words.count('xx') }}{% endfor %}",
        "{% for j in range(100) %}{% for i in range(5000) %}{% if i == j %}{% endif %}{% endfor %}{% endfor %}",
        "{% for x in range(6) recursive %}{% if not loop.depth0 %}{{ loop(numbers) }}{% endif %}{% endfor %}",
        *(
            "{% for j in range(200) %}{% for i in range(1000) %}" + body + "{% endfor %}{% endfor %}"
            for body in (
                "{% set x = messages.nothing or messages.nothing or messages.nothing %}" * 20,
                "{% if not messages %}{% elif messages.nothing %}{% else %}{% set x = 1 %}{% endif %}" * 20,
            )
        ),
        "{% set t, d = (0,) * 30000, {} %}" + LOOP + "{% set x = d[t] %}{% endfor %}",
        LOOP + "{% set x = numbers|max %}{% endfor %}",
        LOOP + "{% set x = numbers|map('abs')|select('odd')|max %}{% endfor %}",
        LOOP + "{% set x = 'a' in numbers %}{% endfor %}",
        LOOP + "{% set x = list.count('x') %}{% endfor %}",
        "{{ range(0, (2 ** 61 - 1) * 20000, 2 ** 61 - 1)|unique|list }}",
        "{{ equal.split()|map('int')|unique|list }}",
        "{{ {}.fromkeys(equal.split()|map('int')) }}",
        "{{ dict(equal.split()|map('int')|batch(2)) }}",
        "{{ namespace(equal.split()|map('int')|batch(2)) }}",
        "{% for i in range(20) %}{{ ('x' * 100000).rfind('x' * 1000 ~ 'y' ~ 'x' * 49000) }}{% endfor %}",
        *(
            "{% for i in range(20) %}{{ text" + strip + "('y' * 500000 ~ 'x')|length }}{% endfor %}"
            for strip in (".strip", ".lstrip", ".rstrip", "|trim")
        ),
        LOOP + "{% if 'yy' in text %}{% endif %}{% endfor %}",
        LOOP + "{% if text == text ~ 'y' %}{% endif %}{% endfor %}",
        LOOP + "{% if text is eq(words) %}{% endif %}{% endfor %}",
        LOOP + "{% set x = text[1:] %}{% endfor %}",
        LOOP + "{% set ns.b = ns.b + [i] %}{% endfor %}",
        LOOP + "{% set x = list|sort %}{% endfor %}",
        "{{ list|sort(attribute='real,' * 50000) }}",
        "{{ list|map(attribute='real.' * 50000)|list }}",
        "{{ words|groupby('nothing', default=text)|length }}",
        "{{ list|selectattr('real.' * 50000)|list }}",
        "{{ list|min(attribute='real.' * 50000) }}",
        "{{ ('<!--x-->' * 100000)|striptags }}",
        "{{ list|unique|list }}",
        "{{ " + "1 + " * 5000 + "1 }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    ],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    for made, source in zip(bounded(REFUSED[kind]), REFUSED[kind], strict=True):
        assert made.startswith("the chat template: "), source


NAMES = [f"a{i}" for i in range(600)]
#: Jinja would compile them in 11 s and more, or to code of 600 MB
UNCOMPILED = {
    "too many expressions, names or statements, or too deeply nested ones": [
        "".join(f"{{%set {name}=1%}}" for name in NAMES) + "{%if a%}{%endif%}" * 600,
        "{{ a }}" * 15_000,
        "{{ [" + "[]," * 20_000 + "] }}",
        "{% for a in b %}" * 21 + "{% endfor %}" * 21,
    ],
    "include: there are no other templates": ["{% set a = 1 %}{% include a %}"],
    "import: there are no other templates": ["{% import 'a' as b %}"],
    "fromimport: there are no other templates": ["{% from 'a' import b %}"],
    "extends: there are no other templates": ["{% extends 'a' %}"],
    "an object of more than 256 keys": ["{{ {" + ", ".join(f"{i}: 1" for i in range(257)) + "} }}"],
    "a scoped block": ["{% for a in messages %}{% block b scoped %}{% endblock %}{% endfor %}"],
}


@pytest.mark.parametrize("message", UNCOMPILED)
def test_compiling(message: str) -> None:
    for made, source in zip(bounded(UNCOMPILED[message]), UNCOMPILED[message], strict=True):
        assert made == f"the chat template: {message}", source


def test_a_long_template() -> None:
    with pytest.raises(ValueError, match=r"^the chat template has 131073 characters, more than 131072$"):
        render("x" * 131_073)
    assert len(render("x" * 131_072)) == 131_072


def _expressions() -> list[str]:
    """Every filter, test and method of what a template may hold, of large values."""
    environment = chat_environment.Environment()
    operands = ("('x ' * 150000)", "(range(2000)|list)", "{'a': 'x' * 300000}")
    names = [name for name in environment.filters if name.isidentifier()]
    made = [f"{value}|{name}" for name in names for value in operands]
    made += [f"{value} is {name}" for name in environment.tests if name.isidentifier() for value in operands]
    kinds = (
        *zip(operands, (str, list, dict), strict=True),
        ("(1,)", tuple),
        ("(2 ** 13000)", int),
        ("(1.5)", float),
    )
    return made + [
        f"{value}.{name}" for value, kind in kinds for name in dir(kind) if not name.startswith("_")
    ]


@pytest.mark.parametrize("arguments", ["", "10**9", "-10**9, 'ceil'", "'', 'x' * 300000", "range(2000)|list"])
def test_every_filter_test_and_method(arguments: str) -> None:
    """Whatever comes out, the memory is bounded."""
    bounded([f"{{{{ ({expression}({arguments}))|string|length }}}}" for expression in _expressions()])


def plain(source: str) -> str:
    """What Jinja makes of a template, without bounds."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    values: dict[str, Any] = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>", "tools": None}
    return environment.from_string(source).render(**values)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.revindex0 }}"
        "{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }}"
        "{{ loop.changed(m.role) }}{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }},{% else %}none{% endfor %}",
        "{% for x in nothing %}{{ x }}{% else %}none{% endfor %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}"
        "{{ loop.depth }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% break %}{% endfor %}",
        "{% for c in 'abc' %}{% if c == 'b' %}{% continue %}{% endif %}{{ c }}{{ loop.length }}{% endfor %}",
        "{% for k in messages[0] %}{{ k }}{% endfor %}",
        "{{ 1 < 2 < 3 }}{{ 3 > 2 == 2 }}{{ 'a' in 'abc' }}{{ 4 not in [1, 2] }}{{ nothing == none }}"
        "{{ nothing }}",
        "{{ messages[::-1][0].role }}{{ 'abcdef'[1:4:2] }}{{ [1, 2, 3][-2:] }}{{ messages[1:]|length }}",
        "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ {'a': [1, (2,)], 'b': {}} }}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x ~ 'b' ~ 1 ~ none ~ [1] ~ nothing }}",
        "{% macro f(a, b='c') %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ f(1, 2, 3) }}"
        "{{ f(a=1) }}",
        "{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{% with a = 1, b = [2] %}{{ a }}{{ b }}{% endwith %}",
        "{% set ns = namespace(a=[]) %}{% for i in range(3) %}{% set ns.a = ns.a + [i] %}{% endfor %}"
        "{{ ns.a }}{{ ns }}",
        "{% set a, b = '<a>', '<b>'|safe %}{% autoescape true %}{{ a }}{{ a ~ b }}"
        "{{ a + b }}{% endautoescape %}{{ a ~ b }}",
        "{{ messages|map(attribute='role')|join(', ') }}{{ messages|map('length')|list }}"
        "{{ messages|selectattr('more')|list }}",
        "{{ [3, 1, 2]|sort }}{{ [3, 1]|map('string')|map('upper')|list }}"
        "{{ messages|rejectattr('role', 'equalto', 'user')|list }}",
        "{{ messages|groupby('role') }}{{ [1, 1, 2]|unique|list }}{{ [1, 2]|sum }}"
        "{{ {'b': 1, 'a': 2}|dictsort }}",
        "{{ [1, 2]|first }}{{ [1, 2]|last }}{{ [1, 2]|max }}{{ 'ab'|reverse }}{{ [1, 2]|reverse|list }}"
        "{{ 'a'|list }}",
        "{{ 2.567|round(2) }}{{ 2.5|round(method='floor') }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -3 }}"
        "{{ 7 / 2 }}{{ 1 + 1.5 }}",
        "{{ messages[0].more|string }}{{ messages[0].more|tojson }}{{ '1'|int + '2.5'|float }}"
        "{{ nothing|default('d') }}",
        "{% set j = joiner(',') %}{{ j() }}a{{ j() }}b{% set c = cycler(1, 2) %}{{ c.next() }}"
        "{{ c.next() }}{{ c.current }}",
        "{{ 'a,b'.split(',') }}{{ 'abc'.startswith('a') }}{{ ' a '|trim }}{{ 'a b'|title }}"
        "{{ 'x'.join('abc') }}{{ 'a'|e }}",
        "{{ messages is defined }}{{ messages is sequence }}{{ tools is none }}"
        "{{ 'a' is string and 1 is number }}{{ 4 is even }}",
        "{{ dict(a=1, b=2).get('c', 3) }}{{ messages[0].get('role') }}{{ messages[0]['nothing'] }}"
        "{{ range(3) }}{{ 'a' * 3 }}",
        "{{ [1, 2, 3, 4]|batch(3, 'x')|list }}{{ [1, 2, 3]|slice(2)|list }}{{ 'a\nb'|indent }}"
        "{{ 'a-b'|replace('-', '+') }}",
        "{% if messages[0].role == 'user' and not tools %}a{% elif true %}b{% else %}c{% endif %}"
        "{{ 'a' if false }}",
        "{{ loop is defined }}{{ messages|map('attr', 'x')|list|length }}"
        "{{ messages[0]|attr('keys') is callable }}",
    ],
)
def test_as_jinja(source: str) -> None:
    assert render(source) == plain(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ nothing.x }}", "'nothing' is undefined"),
        ("{% for x in 1 %}{% endfor %}", "TypeError: 'int' object is not iterable"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
    ],
)
def test_errors_as_jinja(source: str, message: str) -> None:
    words = message.removeprefix("TypeError: ")
    with pytest.raises((TypeError, jinja2.UndefinedError), match=re.escape(words)):
        plain(source)
    with pytest.raises(ValueError, match=f"^the chat template: {re.escape(message)}$"):
        render(source)
