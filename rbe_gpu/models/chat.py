"""Chat templates: Jinja templates that make one text of a conversation, as transformers renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

_LONGEST = 1_000_000  # characters of a conversation
_INDENT = 100  # characters before a line


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


#: filters and methods of texts that make a text as long as a number in the template says
_LENGTHENING = (
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "translate",
    "batch",
    "slice",
    "wordwrap",
    "format_map",
)
#: a width of five digits in a text that is formatted, or one from elsewhere
_WIDE = re.compile(r"\d{5}|\*|\{[^{}]*\{")


def _check_call(text: str, name: str, arguments: Sequence[Any]) -> bool:
    """Whether a method of a text makes no text that is longer than _LONGEST."""
    if name in ("format", "replace", "join") and arguments:
        first, last = arguments[0], arguments[-1]
        if name == "format":
            return not _WIDE.search(text)
        if name == "join":
            return not hasattr(first, "__len__") or len(text) * len(first) <= _LONGEST
        return (
            not isinstance(last, str)
            or (len(text) + 1) * len(last) <= _LONGEST
            or text.count(first) * len(last) <= _LONGEST
        )
    return name not in _LENGTHENING


def _environment() -> Any:
    """Jinja's sandbox with what transformers offers to templates, and texts and products that are bounded."""
    import jinja2
    import jinja2.sandbox

    class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            """A method of a text, within _LONGEST."""
            # the sandbox wraps `format`
            text, name = (
                getattr(getattr(obj, "__wrapped__", obj), "__self__", None),
                getattr(obj, "__name__", ""),
            )
            if isinstance(text, str) and not _check_call(text, name, args):
                raise jinja2.TemplateError(f"{name} of too large values")
            return super().call(context, obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """A product of numbers, or a text repeated, within _LONGEST."""
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "%":
                if isinstance(left, str) and _WIDE.search(left):
                    raise jinja2.TemplateError("% of too large values")
                return super().call_binop(context, operator, left, right)
            if operator == "**" or not numbers:
                size = max(len(a) if isinstance(a, str | list | tuple) else 1 for a in (left, right))
                times = max((a for a in (left, right) if isinstance(a, int | float)), default=1)
                if (not numbers and size * times > _LONGEST) or (operator == "**" and times > 64):
                    raise jinja2.TemplateError(f"{operator} of too large values")
            return super().call_binop(context, operator, left, right)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        if indent is not None and not 0 <= indent <= _INDENT:
            raise jinja2.TemplateError("tojson of too large values")
        return json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )

    indented = environment.filters["indent"]

    def indent(text: str, width: int | str = 4, *args: Any, **kwargs: Any) -> Any:
        if (len(width) if isinstance(width, str) else width) > _INDENT:
            raise jinja2.TemplateError("indent of too large values")
        return indented(text, width, *args, **kwargs)

    for name in (*_LENGTHENING, "format"):
        environment.filters.pop(name, None)
    del environment.globals["lipsum"]
    environment.filters["indent"] = indent
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
