"""Jinja's sandbox for the chat templates of untrusted files, with bounds of memory and time.

    operations <= 500,000,   sum over the operations of (characters that it reads + characters that it makes) <= 2^26

An entry of a list counts 16 and what it holds. A template is rewritten so that a `Meter` sees every operation:
calls, filters, tests, operators, comparisons, slices, lists, joined texts, steps of loops, what is printed. What is
left (attributes, conditions, assignments) costs little: each body of statements counts 1, 1 for each 4 nodes of its
syntax tree, and the characters of its texts, whenever it runs. Before an operation the meter knows the length of all
that goes in, lists with what they hold; operations that can make more than a few times as much (a text repeated,
padded, replaced, indented), or take longer than it is, have a bound of their own.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from datetime import datetime
from functools import wraps
from string import Formatter
from types import GeneratorType
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

#: of a rendering, which take 2.3 s; templates of Llama, Qwen, Gemma and SmolLM take 20 to 46 for a message
_OPERATIONS = 500_000
_CHARACTERS = 1 << 26  # that they read and make: those templates 5 to 11 for each of a conversation
_LARGEST = 1 << 22  # characters of a value, those in a list together
_LONGEST = 1_000_000  # of a text made by repeating or replacing
_ENTRY = 16
_INDENT = 100  # characters before a line
_WIDEST = 10_000  # characters of the widths of a format, lists of a slice, entries of a batch
_BITS = 14_000  # of an integer; Python writes 4,300 digits
_DECIMALS = 308  # to round to
_SLOW_LENGTH = 10_000  # of what takes time beyond the length of a value
#: methods of texts that compare characters as often as the product of two lengths; 16 of them count as one
_PRODUCT = ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip")
_SLOW = ("pprint", "striptags", "sum", "unique", "urlize")
#: where a filter has the name of an attribute: parts between points and commas, each looked up in every entry
_ATTRIBUTE = {
    "groupby": 1,
    "join": 2,
    "map": 9,
    "max": 2,
    "min": 2,
    "rejectattr": 1,
    "selectattr": 1,
    "sort": 3,
}
_PARTS = 16
#: statements whose bodies Jinja compiles with tables of all names
_SCOPES = (
    nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Block, nodes.AssignBlock,
    nodes.Scope, nodes.ScopedEvalContextModifier,
)  # fmt: skip
_NAMES_TIMES_SCOPES = 1 << 17  # which take 0.3 s
_DEPTH = 20  # of those statements: Jinja walks through the body of a loop once for each loop around it
_KEYS = 256  # of an object that a template writes: they can have equal hashes
_NODES = 10_000  # of the syntax tree, which take up to 10 kB each to compile; a template of 1,185 characters has 155
_DEFAULT = 1000  # characters of the arguments of groupby
_OF_JINJA = ("_loop_vars", "_block_vars")  # variables of a loop or block, handed to every call in it
#: values by identity, with their sizes; a value that is held keeps its identity
_Sizes = dict[int, tuple[int, Any]]
_LISTS = (Mapping, Sequence, AbstractSet, ValuesView)
_NUMBER = re.compile(r"\d+")
#: flags, width and precision, and the letter behind them
_CONVERSION = re.compile(r"[-#0 +]*([\d*]*\.?[\d*]*)[hlL]?.?", re.DOTALL)
#: methods that make a text, or bytes, as long as a number in the template says; filters of these names are removed
_LENGTHENING = (
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "translate",
    "wordwrap",
    "format_map",
    "encode",
    "to_bytes",
)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _check(small: bool, name: str) -> None:
    if not small:
        _refuse(f"{name} of too large values")


class Meter:
    """What one rendering may still spend.

    Parameters
    ----------
    values : of the caller, which a template cannot change: lists and objects in them are measured once
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._known: _Sizes = {}
        self._operations = self._characters = 1 << 62
        for value in values.values():
            self._size(value, self._known)
        self._operations, self._characters = _OPERATIONS, _CHARACTERS

    def spend(self, characters: int = 0, operations: int = 1) -> None:
        """Operations that read or make so many characters."""
        self._operations -= operations
        self._characters -= characters
        if self._operations < 0 or self._characters < 0:
            _refuse(f"it takes more than {_OPERATIONS} operations, or they read and make too much text")

    def see(self, value: Any, name: str) -> int:
        """The length of a value of an operation, those of its entries included; it is paid for."""
        self.spend()
        if id(value) in self._known:
            return self._known[id(value)][0]
        size = self._size(value, {})
        _check(size <= _LARGEST, name)
        return size

    def _size(self, value: Any, seen: _Sizes) -> int:
        """At least a tenth of the characters of str(value), each text as often as it occurs."""
        if isinstance(value, jinja2.utils.Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        if isinstance(value, str | bytes):
            self.spend(len(value), 0)
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > _BITS:
                _refuse(f"a number of more than {_BITS} bits")
            return _ENTRY + value.bit_length() // 3
        if isinstance(value, range):
            self.spend(_ENTRY * len(value), 0)
            return _ENTRY * (1 + len(value))
        if not isinstance(value, _LISTS) or isinstance(value, jinja2.runtime.Context):
            return _ENTRY
        for sizes in (self._known, seen):
            if id(value) in sizes:
                return sizes[id(value)][0]
        seen[id(value)] = _LARGEST, value  # of one that holds itself
        self.spend(_ENTRY * len(value), 0)
        size = sum(_ENTRY + self._size(entry, seen) for entry in value)
        if isinstance(value, Mapping):
            size += sum(self._size(entry, seen) for entry in value.values())
        seen[id(value)] = size, value
        return size

    def each(self, values: Any) -> Iterator[Any]:
        """The values of a loop."""
        for value in values:
            self.spend()
            yield value

    def made(self, value: Any, name: str) -> Any:
        """A value that an operation has made; a generator's when they are taken."""
        if type(value) is GeneratorType:
            return self._every(value, name)
        self.see(value, name)
        return value

    def _every(self, values: Any, name: str) -> Iterator[Any]:
        for value in values:
            self.see(value, name)
            yield value


# --- operations that can make more than they read --------------------------------------------------------


def _widths(numbers: Sequence[str]) -> int:
    return sum(int(n) if len(n) < 8 else _LARGEST for n in numbers)


def _check_format(text: str, size: int) -> None:
    """Fields of `str.format`: small widths, none of them from a value, and a bound of what they print."""
    specs = [spec or "" for _, name, spec, _ in Formatter().parse(text) if name is not None]
    widths = _widths([n for spec in specs for n in _NUMBER.findall(spec)])
    _check(not any("{" in spec for spec in specs) and widths <= _WIDEST, "format")
    _check(len(specs) * size <= _LARGEST, "format")


def _conversions(text: str) -> Iterator[str]:
    """Width and precision of each conversion of `text % values`."""
    at = text.find("%")
    while at >= 0:
        at += 1
        depth = int(text[at : at + 1] == "(")  # a key, which may hold brackets
        while depth and at < len(text) - 1:
            at += 1
            depth += (text[at] == "(") - (text[at] == ")")
            if not depth:
                at += 1
        conversion = _CONVERSION.match(text, at)
        assert conversion is not None  # it matches an empty text
        yield conversion[1]
        at = text.find("%", conversion.end())


def _check_percent(text: str, size: int, name: str) -> None:
    """Conversions of `text % values`, as `_check_format`."""
    conversions = list(_conversions(text))
    widths = _widths([n for w in conversions for n in _NUMBER.findall(w)])
    _check(not any("*" in width for width in conversions) and widths <= _WIDEST, name)
    _check(len(conversions) * size <= _LARGEST, name)


def _check_replace(text: str, old: str, new: str) -> None:
    # Markup escapes both before it counts
    plain = type(text) is type(old) is str
    small = (len(text) + 1) * len(new) <= _LONGEST or (plain and text.count(old) * len(new) <= _LONGEST)
    _check(small, "replace")


def _check_indent(width: Any, name: str) -> int:
    """The length of an indentation: short, and without lines that a second one would indent."""
    if isinstance(width, str):
        _check(len(width) <= _INDENT and len(f"{width}.".splitlines()) == 1, name)
        return len(width)
    _check(not isinstance(width, int | float) or width <= _INDENT, name)
    return int(width or 0)


def _depth(value: Any, seen: dict[int, int]) -> int:
    """How deep lists and objects are nested."""
    if isinstance(value, str | bytes) or not isinstance(value, Mapping | Sequence):
        return 0
    if id(value) not in seen:
        entries = value.values() if isinstance(value, Mapping) else value
        seen[id(value)] = 1 + max((_depth(entry, seen) for entry in entries), default=0)
    return seen[id(value)]


def _taken(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values, with lists of what generators give."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


# --- the sandbox -----------------------------------------------------------------------------------------


class _Rewriter(jinja2.visitor.NodeTransformer):
    """Puts filters of `_Environment` around what Jinja compiles to plain Python."""

    @staticmethod
    def _filter(node: Any, name: str) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _seen(self, node: Any) -> Any:
        return self._filter(self.generic_visit(node), _SEE)

    visit_List = _seen

    def visit_Dict(self, node: Any) -> Any:
        if len(node.items) > _KEYS:
            _refuse(f"an object of more than {_KEYS} keys")
        return self._seen(node)

    def visit_Tuple(self, node: Any) -> Any:
        return self._seen(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: Any) -> Any:
        if isinstance(node.arg, nodes.Slice):
            return self._seen(node)
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Const):  # whose hash Python computes at each lookup
            node.arg = self._filter(node.arg, _SEE)
        return node

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._filter(self._filter(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _SEE), _CONCAT)

    def visit_Compare(self, node: Any) -> Any:
        self.generic_visit(node)
        node.expr = self._filter(node.expr, _SEE)
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, _SEE)
        return node

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _EACH)
        return node


#: filters whose names stand behind no `|`; `map` can name them, and what they do then is metered as well
_SEE, _EACH, _CONCAT = "an expression", "a loop", "~"


def _check_template(template: nodes.Template) -> None:
    """Refuse what Jinja would compile to much more code than there is template, or in much more time."""
    names, count, scopes = set(), 0, 0
    left: list[tuple[nodes.Node, int]] = [(template, 0)]
    while left:
        node, depth = left.pop()
        if isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
            _refuse(f"{type(node).__name__.lower()}: there are no other templates")
        if isinstance(node, nodes.Block) and node.scoped:
            _refuse("a scoped block")
        if isinstance(node, nodes.Name):
            names.add(node.name)
        count += 1
        scopes += isinstance(node, _SCOPES)
        depth += isinstance(node, _SCOPES)
        if depth > _DEPTH or count > _NODES or len(names) * scopes > _NAMES_TIMES_SCOPES:
            _refuse("too many expressions, names or statements, or too deeply nested ones")
        left += [(child, depth) for child in node.iter_child_nodes()]


def _counts(node: nodes.Node) -> tuple[int, int]:
    """Nodes, and characters of text, of a statement without its bodies."""
    count, characters = 1, len(node.data) if isinstance(node, nodes.TemplateData) else 0
    for child in node.iter_child_nodes(exclude=("body", "else_")):
        more = _counts(child)
        count, characters = count + more[0], characters + more[1]
    return count, characters


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    def visit_Template(self, node: Any, frame: Any = None) -> None:
        _check_template(node)
        super().visit_Template(_Rewriter().visit(node), frame)

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        """A body of statements, which pays for itself before it runs."""
        count, characters = map(sum, zip(*map(_counts, nodes), (4, 0), strict=True))
        self.writeline(f"environment.meter.spend({characters}, {count // 4})")
        super().blockvisit(nodes, frame)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training: here its text alone."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with what transformers offers to templates. A rendering sets the meter of its thread."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        # without the optimiser, which runs operations when a template is compiled
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            optimized=False,
            finalize=self._printed,
        )
        self._thread = threading.local()
        for name in _LENGTHENING:
            self.filters.pop(name, None)
        del self.globals["lipsum"]
        bounded: tuple[Any, ...]
        bounded = (_batch, self._format, _indent, self._join, _replace, _round, _slice, _tojson)
        self.filters |= {function.__name__.removeprefix("_"): function for function in bounded}
        tables: tuple[dict[str, Any], ...] = (self.filters, self.tests)  # type: ignore[assignment]
        for table in tables:
            table |= {name: self._metered(name, function) for name, function in table.items()}
        self.filters[_SEE] = lambda value: self.meter.made(value, _SEE)
        self.filters[_EACH] = lambda values: self.meter.each(values)
        self.filters[_CONCAT] = self._concat
        self.globals["range"] = _range
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now

    @property
    def meter(self) -> Meter:
        meter: Meter = self._thread.meter
        return meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._thread.meter = meter

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if name in _SLOW:  # what a generator will give counts too
                args = _taken(args)
            sizes = [self.meter.see(value, name) for value in (*args, *kwargs.values())]
            if name == "trim":
                self.meter.spend(sizes[0] * sum(sizes[1:]) // 16)
            _check(name not in _SLOW or sum(sizes) <= _SLOW_LENGTH, name)
            # its default is made lower-case for every entry
            _check(name != "groupby" or sum(sizes) - sizes[1] <= _DEFAULT, name)
            if name in _ATTRIBUTE:  # behind the environment or context, and the list
                attribute = str(kwargs.get("attribute", [*args[2:], *[""] * 9][_ATTRIBUTE[name] - 1]))
                _check(attribute.count(".") + attribute.count(",") < _PARTS, name)
            result = function(*args, **kwargs)
            return result if any(result is value for value in args) else self.meter.made(result, name)

        return metered

    # positional: arguments of the template may have these names
    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(obj, "__name__", "")
        if obj in (dict, jinja2.utils.Namespace):
            args = _taken(args)
        named = [value for key, value in kwargs.items() if key not in _OF_JINJA]
        size = sum(self.meter.see(value, name) for value in (*args, *named))
        if isinstance(owner, _LISTS):
            length = self.meter.see(owner, name)
        if isinstance(owner, str):
            if name in _PRODUCT:
                self.meter.spend(length * size // 16)
            if name == "format":
                _check_format(owner, size)
            elif name == "join" and args:
                args = (self._joined(args[0], len(owner)), *args[1:])
            elif name == "replace" and len(args) > 1:
                _check_replace(owner, *map(str, args[:2]))
            _check(name not in _LENGTHENING, name)
        _check(not isinstance(owner, bytes) and name != "to_bytes", name)
        # keys with equal hashes, which a template can choose, take time with the square of their number
        keyed = obj in (dict, jinja2.utils.Namespace) and not all(
            isinstance(value, Mapping) for value in args
        )
        _check(name != "fromkeys" and not (keyed and size > _SLOW_LENGTH), name.lower())
        if isinstance(obj, jinja2.runtime.LoopContext) and args:  # a recursive loop
            args = (self.meter.each(args[0]), *args[1:])
        return self.meter.made(super().call(context, obj, *args, **kwargs), name)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, bytes) or isinstance(right, bytes):
            _refuse(f"{operator} with bytes")
        sizes = [self.meter.see(value, operator) for value in (left, right)]
        if operator == "%" and isinstance(left, str):
            _check_percent(left, sizes[1], operator)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * right <= _BITS, operator)
        elif operator == "*":
            for value, size, times in ((left, sizes[0], right), (right, sizes[1], left)):
                if not isinstance(value, int | float) and isinstance(times, int):
                    _check(size * times <= _LONGEST, operator)
        return self.meter.made(super().call_binop(context, operator, left, right), operator)

    def concat(self, parts: Iterable[str]) -> str:
        """What a block or a macro has printed."""
        parts = list(parts)
        _check(sum(map(len, parts)) <= _LARGEST, "a block")
        text = "".join(parts)
        self.meter.spend(len(text))
        return text

    @jinja2.pass_context
    def _printed(self, context: Any, value: Any) -> Any:
        self.meter.see(value, "output")
        return value

    @jinja2.pass_eval_context
    def _concat(self, eval_context: Any, parts: Any) -> str:
        join = jinja2.runtime.markup_join if eval_context.autoescape else jinja2.runtime.str_join
        text = join(parts)
        self.meter.spend(len(text))
        return text

    def _joined(self, values: Any, separator: int) -> Any:
        """What `join` reads: a list, measured."""
        values = list(values)
        _check(self.meter.see(values, "join") + len(values) * separator <= _LARGEST, "join")
        return values

    def _format(self, text: Any, *args: Any, **kwargs: Any) -> str:
        _check_percent(str(text), self.meter.see([args, kwargs], "format"), "format")
        return jinja2.filters.do_format(text, *args, **kwargs)

    @jinja2.pass_eval_context
    def _join(self, eval_context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        return jinja2.filters.sync_do_join(eval_context, self._joined(value, len(str(d))), d, attribute)


def _range(*args: int) -> range:
    _check(all(abs(number) < 1 << 31 for number in args), "range")
    return jinja2.sandbox.safe_range(*args)


_range.__name__ = "range"  # of messages


def _strftime_now(format: str) -> str:
    _check(len(format) <= _INDENT, "strftime_now")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    width = _check_indent(indent, "tojson")
    _check(all(isinstance(text, str) and len(text) <= _INDENT for text in separators or ()), "tojson")
    if indent is not None or separators is not None:
        text = json.dumps(value, ensure_ascii=ensure_ascii)
        marks = sum(text.count(mark) for mark in ",:[]{}")
        longest = max(2 + width * (1 + _depth(value, {})), *map(len, separators or ("", "")))
        _check(len(text) + marks * longest <= _LARGEST, "tojson")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    length = _check_indent(width, "indent")
    lines = len(text) if length * len(text) <= _LARGEST else len(text.splitlines())
    _check(length * lines <= _LARGEST, "indent")
    return jinja2.filters.do_indent(text, width, first, blank)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_replace(text, old, new)
    return str(text.replace(old, new, -1 if count is None else count))


def _batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
    _check(linecount <= _WIDEST, "batch")
    return jinja2.filters.do_batch(value, linecount, fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Any:
    _check(slices <= _WIDEST, "slice")
    return jinja2.filters.sync_do_slice(value, slices, fill_with)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    _check(abs(precision) <= _DECIMALS, "round")
    return jinja2.filters.do_round(value, precision, method)
