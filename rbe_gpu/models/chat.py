"""Chat templates: Jinja templates that make one text of a conversation, as transformers renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from string import Formatter
from typing import Any

_LONGEST = 1_000_000  # characters of a conversation
_INDENT = 100  # characters before a line
_WIDEST = 10_000  # characters of the widths of a format, lists of a slice, entries of a batch
_NUMBER = re.compile(r"\d+")
#: flags, width and precision, and the letter behind them
_CONVERSION = re.compile(r"[-#0 +]*([\d*]*\.?[\d*]*)[hlL]?.?", re.DOTALL)


class ChatTemplate:
    """A template of a tokenizer_config.json, a chat_template.jinja or a GGUF file.

    It runs in Jinja's sandbox: it sees the messages and the names of the special tokens, and nothing else.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._compiled: Any = None

    def render(self, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str:
        """The text of a conversation, up to where the answer begins.

        Parameters
        ----------
        messages : objects with `role` and `content`
        special : special tokens by name: "bos_token" and so on

        Raises
        ------
        ImportError
            Jinja is not installed.
        ValueError
            The template is invalid, makes more than a million characters, or refuses the conversation.
        """
        try:
            import jinja2
        except ImportError:
            raise ImportError("chat templates need Jinja; pip install 'rbe-gpu[chat]'") from None
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise ValueError(f"messages[{i}] has no role and content; each is a text")
        pieces: list[str] = []
        length = 0
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self.source)
            values = {
                "messages": list(messages),
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            }
            for piece in self._compiled.generate(**values, **special):
                pieces.append(piece)
                length += len(piece)
                if length > _LONGEST:
                    raise ValueError(f"it makes more than {_LONGEST} characters")
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template: {_line(error)}") from None
        except Exception as error:  # what an expression of the template raises
            raise ValueError(f"the chat template: {type(error).__name__}: {_line(error)}") from None
        return "".join(pieces)


def _line(error: Exception) -> str:
    """What a template may have written: one line, printable, short."""
    words = " ".join(str(error).split())[:300]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


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


def _widths(numbers: Iterable[str]) -> bool:
    """Whether widths, in digits, add up to no more than _WIDEST."""
    return sum(int(n) if len(n) < 8 else _WIDEST + 1 for n in numbers) <= _WIDEST


def _check_format(text: str) -> bool:
    """Whether the fields of `str.format` have small widths, none of them from a value."""
    specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
    return not any("{" in spec for spec in specs) and _widths(
        n for spec in specs for n in _NUMBER.findall(spec)
    )


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


def _check_percent(text: str) -> bool:
    """Whether the conversions of `text % values` have small widths, none of them from a value."""
    widths = list(_conversions(text))
    return not any("*" in width for width in widths) and _widths(
        n for w in widths for n in _NUMBER.findall(w)
    )


def _check_replace(text: str, old: str, new: str) -> bool:
    """Whether a text in which another is replaced stays within _LONGEST."""
    # Markup escapes both before it counts
    plain = type(text) is type(old) is str
    return (len(text) + 1) * len(new) <= _LONGEST or (plain and text.count(old) * len(new) <= _LONGEST)


def _check_indent(width: Any) -> bool:
    """Whether an indentation is short, and makes no lines that a second one would indent."""
    if isinstance(width, str):
        return len(width) <= _INDENT and len(f"{width}.".splitlines()) == 1
    return not isinstance(width, int | float) or width <= _INDENT


def _check_call(owner: Any, name: str, arguments: Sequence[Any]) -> bool:
    """Whether a method makes no text that is longer than _LONGEST."""
    if isinstance(owner, bytes):
        return False
    if not isinstance(owner, str):
        return name != "to_bytes"
    if name == "format":
        return _check_format(owner)
    if name == "join" and arguments:
        return not hasattr(arguments[0], "__len__") or len(owner) * len(arguments[0]) <= _LONGEST
    if name == "replace" and len(arguments) > 1:
        old, new = arguments[:2]
        return not isinstance(old, str) or not isinstance(new, str) or _check_replace(owner, old, new)
    return name not in _LENGTHENING


def _environment() -> Any:
    """Jinja's sandbox with what transformers offers to templates, and texts and products that are bounded."""
    import jinja2
    import jinja2.ext
    import jinja2.filters
    import jinja2.sandbox

    def check(small: bool, name: str) -> None:
        if not small:
            raise jinja2.TemplateError(f"{name} of too large values")

    class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))

        # positional: arguments of the template may have these names
        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            """A call, of a method of a text within _LONGEST."""
            method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
            owner, name = getattr(method, "__self__", None), getattr(obj, "__name__", "")
            check(_check_call(owner, name, args), name)
            return super().call(context, obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """A product of numbers, or a text repeated, within _LONGEST."""
            if isinstance(left, bytes) or isinstance(right, bytes):
                raise jinja2.TemplateError(f"{operator} with bytes")
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "%":
                check(not isinstance(left, str) or _check_percent(left), operator)
            elif operator == "**" or not numbers:
                size = max(len(a) if isinstance(a, str | list | tuple) else 1 for a in (left, right))
                times = max((a for a in (left, right) if isinstance(a, int | float)), default=1)
                check(numbers or size * times <= _LONGEST, operator)
                check(operator != "**" or times <= 64, operator)
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant wrote, for training: here its text alone."""

        tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        check(_check_indent(indent), "tojson")
        check(all(isinstance(text, str) and len(text) <= _INDENT for text in separators or ()), "tojson")
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        check(_check_indent(width), "indent")
        return jinja2.filters.do_indent(text, width, first, blank)

    def replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        check(_check_replace(text, old, new), "replace")
        return str(text.replace(old, new, -1 if count is None else count))

    def format(text: Any, *args: Any, **kwargs: Any) -> str:
        check(_check_percent(str(text)), "format")
        return jinja2.filters.do_format(text, *args, **kwargs)

    def batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
        check(linecount <= _WIDEST, "batch")
        return jinja2.filters.do_batch(value, linecount, fill_with)

    def slice(value: Any, slices: int, fill_with: Any = None) -> Any:
        check(slices <= _WIDEST, "slice")
        return jinja2.filters.sync_do_slice(value, slices, fill_with)

    for name in _LENGTHENING:
        environment.filters.pop(name, None)
    del environment.globals["lipsum"]
    for filter in (batch, format, indent, replace, slice, tojson):
        environment.filters[filter.__name__] = filter
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
