"""Chat templates: Jinja templates that make one text of a conversation, as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

_LONGEST = 1_000_000  # characters of a conversation


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
            raise ValueError(f"the chat template: {error}") from None
        except Exception as error:  # what an expression of the template raises
            raise ValueError(f"the chat template: {type(error).__name__}: {error}") from None
        return "".join(pieces)


def _environment() -> Any:
    """Jinja's sandbox with what transformers offers to templates, and products that are bounded."""
    import jinja2
    import jinja2.sandbox

    class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """A product of numbers, or a text repeated, within _LONGEST."""
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
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
        return json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
