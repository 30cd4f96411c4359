"""A key of a file of a model folder, as the tables of `encoder_settings` and `decoder_settings` list them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Key(NamedTuple):
    """A key of a file.

    Attributes
    ----------
    effect : what it does here, for the documentation; of a key with `accepted`, what another value would do
    accepted : the values that are not refused; None: every one, or those that its reader accepts
    honoured : whether it can change vectors
    """

    effect: str
    accepted: tuple[Any, ...] | None = None
    honoured: bool = False


def honoured(effect: str) -> Key:
    return Key(effect, None, True)


def ignored(*names: str, effect: str = "") -> dict[str, Key]:
    return dict.fromkeys(names, Key(effect))


def only(*accepted: Any, effect: str) -> Key:
    return Key(effect, accepted)


OFF = (None, False)
EMPTY: tuple[Any, ...] = (None, False, "", [], {})
