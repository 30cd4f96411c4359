"""Generation: one token after another, drawn from the logits of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dispatch import to_host
from .decoders import token_ids
from .settings import check_keys, fail
from .tokenizer import tokenizer_errors

if TYPE_CHECKING:
    from ..layers import KVCache
    from .decoder import Decoder

F32 = NDArray[np.float32]
#: tokens of the prompts that are computed at once: scratch memory is that of so many
CHUNK = 512
_REPLACEMENT = "\ufffd"  # what a tokenizer decodes half of a character to
_LONGEST_CHARACTER = 8  # tokens; more of them are no character


class Sampling(NamedTuple):
    """How a token is drawn; the arguments of `Decoder.generate`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self, where: str = "generate") -> None:
        """Raise a ValueError for a value that is out of range."""
        for name, value, valid in (
            ("temperature", self.temperature, "a number from 0"),
            ("top_k", self.top_k, "an integer from 0"),
            ("top_p", self.top_p, "a number above 0, up to 1"),
            ("min_p", self.min_p, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, "a number from 1e-30 to 1e30"),
        ):
            number = isinstance(value, Integral if name == "top_k" else Real) and not isinstance(value, bool)
            in_range = (
                number
                and -1e30 < value <= 1e30
                and {
                    "temperature": value >= 0,
                    "top_k": value >= 0,
                    "top_p": 0 < value <= 1,
                    "min_p": 0 <= value <= 1,
                    "repetition_penalty": value >= 1e-30,
                }[name]
            )
            if not in_range:
                raise ValueError(f"{where} has {name}={value!r}; needs {valid}")


@dataclass(frozen=True)
class Generation:
    """A continuation.

    Attributes
    ----------
    text : without the prompt and without the tokens that end a text
    ids : the new tokens, with the one that ended it
    reason : "eos", "stop" (one of the texts to stop at), "length" (max_new_tokens) or "context" (the model has no
        more positions)
    prompt_tokens : tokens of the prompt
    """

    text: str
    ids: tuple[int, ...]
    reason: str
    prompt_tokens: int


def sampling_of(generation: Mapping[str, Any], eos: tuple[int, ...]) -> tuple[Sampling, tuple[int, ...]]:
    """The defaults of a generation_config.json, and the tokens that end a text; `eos` are those of config.json."""
    where = "generation_config.json"
    check_keys(generation, where)
    if generation.get("eos_token_id") is not None:
        eos = token_ids(generation["eos_token_id"], where, "eos_token_id")
    values = {name: generation[name] for name in Sampling._fields if generation.get(name) is not None}
    drawn = generation.get("do_sample", False)
    if type(drawn) is not bool and drawn is not None:
        fail(where, "do_sample", drawn, "true, false or null")
    if drawn:
        values = {"temperature": 1.0, "top_k": 50, **values}  # the defaults of transformers
    sampling = Sampling(**values)
    sampling.check(where)
    if not drawn:
        sampling = sampling._replace(temperature=0.0)
    return sampling, eos


def next_token(logits: F32, sampling: Sampling, seen: Sequence[int], rng: np.random.Generator) -> int:
    """Draw a token.

    Parameters
    ----------
    logits : (vocab_size,) float32
    seen : the tokens so far, for the repetition penalty

    Raises
    ------
    ValueError
        A logit is NaN or Inf.
    """
    if not np.isfinite(logits).all():
        raise ValueError(
            'the logits hold NaN or Inf; if the states are of a half type, load with dtype="float32"'
        )
    values: NDArray[Any] = logits
    if sampling.repetition_penalty != 1.0 and seen:
        values = logits.astype(np.float64)  # a float32 logit divided by 1e-30 may be beyond float32
        at = np.unique(np.asarray(seen, np.int64))
        some = values[at]
        values[at] = np.where(
            some > 0, some / sampling.repetition_penalty, some * sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return int(np.argmax(values))
    scores = (values.astype(np.float64) - float(values.max())) / max(float(sampling.temperature), 1e-9)
    order: NDArray[np.int64] = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(scores[order])
    p /= p.sum()
    taken = p >= sampling.min_p * p[0]
    taken &= np.cumsum(p) - p < sampling.top_p  # always the first
    p, order = p[taken], order[taken]
    drawn = int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"))
    return int(order[min(drawn, order.size - 1)])


class _Text:
    """One text that grows: its tokens, and the part of it that can be shown."""

    def __init__(
        self, prompt: list[int], decode: Callable[[list[int]], str] | None, stops: Sequence[str]
    ) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.text = ""
        self.reason: str | None = None
        self._decode = decode
        self._stops = stops
        # Tokens that are decoded again with each new one, and the characters of their text that were there before:
        # how a tokenizer decodes a token may depend on the one before it.
        self._tail = prompt[-1:]
        self._before = 0 if decode is None else len(decode(self._tail))
        self._shown = 0  # characters of the text that were handed out

    def add(self, token: int, ends: Sequence[int]) -> None:
        self.ids.append(token)
        if token in ends:
            self.reason = "eos"
            return
        if self._decode is None:
            return
        self._tail.append(token)
        part = self._decode(self._tail)
        if not part.endswith(_REPLACEMENT) or len(self._tail) > _LONGEST_CHARACTER:
            self.text += part[self._before :]
            # a special token has no text: what the next one is decoded behind is the token before it
            self._tail = [token] if self._decode([token]) else self._tail[:-1]
            self._before = len(self._decode(self._tail))
        places = (self.text.find(stop, max(0, self._shown - len(stop))) for stop in self._stops)
        at = min((place for place in places if place >= 0), default=-1)
        if at >= 0:
            self.text, self.reason = self.text[:at], "stop"

    def new_text(self, final: bool) -> str:
        """What can be shown since the last call: nothing that may be the beginning of a text to stop at."""
        held = 0
        if not final:
            for stop in self._stops:
                for n in range(min(len(stop) - 1, len(self.text)), held, -1):
                    if self.text.endswith(stop[:n]):
                        held = n
                        break
        new = self.text[self._shown : len(self.text) - held]
        self._shown += len(new)
        return new


def generate(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[str],
    eos: Sequence[int],
    seed: int | None,
    on_text: Callable[[int, str], object] | None,
) -> list[Generation]:
    """`Decoder.generate` of token ids. eos : tokens that end a text."""
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} is not a positive integer")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("stop is not a text, or an empty one")
    if stops and model.tokenizer is None:
        raise ValueError("the model has no tokenizer, which stop= needs")
    _check_prompts(prompts, model)
    if not prompts:
        return []
    decode: Callable[[list[int]], str] | None = None
    if model.tokenizer is not None:
        decode = partial(_decode, model.tokenizer)
    texts = [_Text(prompt, decode, stops) for prompt in prompts]
    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(len(prompts))]
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    logits = _prefill(model, prompts, cache)
    active = list(range(len(prompts)))
    while active:
        for row, i in enumerate(active):
            text = texts[i]
            text.add(next_token(logits[row], sampling, text.prompt + text.ids, rngs[i]), eos)
            if text.reason is None and len(text.ids) == max_new_tokens:
                text.reason = "length"
            if text.reason is None and len(text.prompt) + len(text.ids) >= model.settings.max_positions:
                text.reason = "context"
            if on_text is not None:
                new = text.new_text(text.reason is not None)
                if new:
                    on_text(i, new)
        running = [row for row, i in enumerate(active) if texts[i].reason is None]
        if len(running) < len(active):
            cache.keep(running)
        active = [active[row] for row in running]
        if active:
            logits = _next_logits(model, [texts[i] for i in active], cache)
    return [Generation(text.text, tuple(text.ids), str(text.reason), len(text.prompt)) for text in texts]


def _check_prompts(prompts: list[list[int]], model: Decoder) -> None:
    """Raise a TypeError or ValueError unless the model can go on behind each prompt."""
    most, vocabulary = model.settings.max_positions, model.settings.vocab_size
    for i, prompt in enumerate(prompts):
        if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt):
            raise TypeError(f"prompts[{i}] holds other values than token ids")
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty; the model has no token to begin with")
        if len(prompt) >= most:
            raise ValueError(f"prompts[{i}] has {len(prompt)} tokens, the model has {most} positions")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(
                f"prompts[{i}] has ids from {min(prompt)} to {max(prompt)}; use 0 to {vocabulary - 1}"
            )


def _next_logits(model: Decoder, texts: list[_Text], cache: KVCache) -> F32:
    """Logits behind the last token of each text, (texts, vocab_size); all tokens before it are in the cache."""
    context = model.settings.first_context
    new = [[text.ids[-1]] for text in texts]
    crosses = [False if context is None else n == context for n in cache.lengths.tolist()]
    if not any(crosses):
        logits: F32 = to_host(model.logits(np.array(new), cache=cache, last=True))
        return logits
    # beyond their first context: all of their tokens are rotated otherwise
    cache.lengths[crosses] = 0
    new = [
        text.prompt + text.ids if crossing else tokens
        for text, tokens, crossing in zip(texts, new, crosses, strict=True)
    ]
    return _prefill(model, new, cache)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    with tokenizer_errors("the tokenizer does not decode what was generated"):
        text: str = tokenizer.decode(ids)
    return text


def _prefill(model: Decoder, prompts: list[list[int]], cache: KVCache) -> F32:
    """Logits behind each prompt, (batch, vocab_size). The prompts are computed in chunks: memory is bounded.

    prompts : tokens behind those in the cache
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    planned = cache.lengths + lengths
    logits = np.empty((len(prompts), model.settings.vocab_size), np.float32)
    chunk = max(16, CHUNK // len(prompts))
    for start in range(0, int(lengths.max()), chunk):
        counts = np.clip(lengths - start, 0, chunk)
        ids = np.zeros((len(prompts), int(counts.max())), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : counts[row]] = prompt[start : start + chunk]
        states = model._packed(ids, counts, cache, planned)
        ended = np.flatnonzero((counts > 0) & (start + counts == lengths))
        if ended.size:
            ends = (np.cumsum(counts) - 1)[ended]
            logits[ended] = to_host(model._logits(states[ends]))
    return logits


def prompt_list(prompts: Any) -> list[Any]:
    """The prompts of a call, each a text or token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}; pass a text, or a list of texts or of token ids"
        )
    if prompts and isinstance(prompts[0], int | np.integer):
        raise TypeError("prompts is a list of token ids; pass a list of such lists ([ids])")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise TypeError(f"prompts[{i}] is a {type(prompt).__name__}; pass a text or token ids")
    return list(prompts)
