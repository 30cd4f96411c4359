"""Held-out texts: which of the texts are not trained on, and choose the best state instead."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from ..evaluate import NEIGHBOURS

MIN_TEXTS = NEIGHBOURS + 1
_PART = 16  # one of so many is held out
_MAX_TEXTS = 256
_TOKENS, _MAX_TOKENS = 1 << 14, 1 << 15
_SAMPLE_TEXTS, _SAMPLE = 256, 1000  # characters of each, which the characters of a token are counted on
_SPACE, _MAX_WORD = re.compile(r"\s"), 200

TokenIds = Callable[[str], Sequence[int]]


def digest(*parts: str) -> str:
    """A hash of strings, hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return whole.hexdigest()


def by_count(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: one of 16 by a hash, 256 at most; of few texts, enough to measure on."""
    ordered = sorted(texts, key=digest)
    held_out = ordered[:: min(_PART, max(1, len(ordered) // MIN_TEXTS))][:_MAX_TEXTS]
    excluded = set(held_out)
    return [text for text in texts if text not in excluded], held_out


def by_tokens(texts: Sequence[str], token_ids: TokenIds, min_tokens: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts: a sixteenth of all characters, those of 16,384 tokens at most and of `min_tokens`
    at least, in the order of a hash. The last text is cut where it is longer than that, and its rest trained on, so
    that a few long texts, or one, make both.

    Parameters
    ----------
    texts : all different
    token_ids : the tokens of a text
    """
    ordered = sorted(texts, key=digest)
    token = _characters_of_a_token(ordered, token_ids)
    wanted = max(sum(map(len, texts)) / _PART, min_tokens * token)
    taken = _taken(ordered, int(min(wanted, _TOKENS * token)))
    return [rest for text in texts if (rest := text[taken.get(text, 0) :])], [
        text[:at] for text, at in taken.items()
    ]


def bounded(texts: Sequence[str], token_ids: TokenIds) -> list[str]:
    """The texts; of more than some 32,768 tokens so many, in the order of a hash, the last text cut."""
    ordered = sorted(texts, key=digest)
    most = int(_MAX_TOKENS * _characters_of_a_token(ordered, token_ids))
    if sum(map(len, texts)) <= most:
        return list(texts)
    return [text[:at] for text, at in _taken(ordered, most).items()]


def _characters_of_a_token(texts: Sequence[str], token_ids: TokenIds) -> float:
    sample = "\n\n".join(text[:_SAMPLE] for text in texts[:_SAMPLE_TEXTS])
    return len(sample) / max(1, len(token_ids(sample)))


def _taken(texts: Sequence[str], characters: int) -> dict[str, int]:
    """text -> how many of its characters, of the first texts that have so many together. One is cut between words."""
    taken: dict[str, int] = {}
    for text in texts:
        if characters <= 0:
            break
        at = len(text)
        if at > characters:
            space = _SPACE.search(text, characters, characters + _MAX_WORD)
            at = characters if space is None else space.start()
        taken[text] = at
        characters -= at
    return taken
