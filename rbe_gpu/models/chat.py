"""Chat templates: Jinja templates that make one text of a conversation, as transformers renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 1_000_000  # characters of a conversation
_LONGEST_TEMPLATE = 1 << 17  # characters, which take 1.5 s to parse; `_check_template` bounds the rest


class ChatTemplate:
    """A template of a tokenizer_config.json, a chat_template.jinja or a GGUF file.

    It runs in a bounded sandbox of Jinja: it sees the messages and the names of the special tokens, and nothing else.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._made: Any = None  # environment and template, compiled

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
            The template is invalid, longer than 131,072 characters, beyond a bound of memory or time
            (`chat_environment`), makes more than a million characters, or refuses the conversation.
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
        if len(self.source) > _LONGEST_TEMPLATE:
            raise ValueError(
                f"the chat template has {len(self.source)} characters, more than {_LONGEST_TEMPLATE}"
            )
        from .chat_environment import Environment, Meter

        pieces: list[str] = []
        length = 0
        values = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **special,
        }
        try:
            if self._made is None:
                environment = Environment()
                self._made = environment, environment.from_string(self.source)
            environment, template = self._made
            environment.meter = Meter(values)
            for piece in template.generate(**values):
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
