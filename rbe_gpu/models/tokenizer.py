"""The tokenizer of a model folder: tokenizer.json with the settings of the other files put into it.

transformers makes a BertTokenizer from the vocabulary of tokenizer.json and the keys of tokenizer_config.json, and
any other supported class from tokenizer.json as it is. sentence-transformers may put a lower-casing step in front.
Both are done here on the JSON, so that a compressed file holds one tokenizer that needs no other settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..json_checks import quoted
from .json_files import present, read_json, read_optional
from .settings import check_keys, fail, same, shown
from .tokenizer_bounds import check_bounds, check_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BERT = ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer")
_ROBERTA = ("RobertaTokenizer",)
_AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")  # without "Fast"
_UNIGRAM = ("XLMRobertaTokenizer",)
#: the special tokens of BertTokenizer
_BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_SPECIAL = (*_BERT_SPECIAL, "bos_token", "eos_token")
_ROBERTA_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
#: the special tokens of a class, where the files name none
_DEFAULTS = {
    "BertTokenizer": _BERT_SPECIAL,
    "DistilBertTokenizer": _BERT_SPECIAL,
    "MPNetTokenizer": {**_ROBERTA_SPECIAL, "unk_token": "[UNK]"},
    "RobertaTokenizer": _ROBERTA_SPECIAL,
}
#: a letter of Old Church Slavonic, which takes the unknown token
_UNKNOWN = "a \ua66e"
_LONG_NUMBER = b"0" * 8
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
#: that an added token is normalised when the tokenizer is made; a name may hold escapes
_NORMALIZED = (re.compile(rb'"normalized"\s*:\s*true'), re.compile(rb"\\u00[67]"))  # 4 ms for 0.5 MB as one
_NO_VOCABULARY = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def tokenizer_json(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], lower: bool = False
) -> bytes | None:
    """The tokenizer that transformers makes from a folder, as a tokenizer.json; None if there is none.

    Parameters
    ----------
    folder : with tokenizer.json, or vocab.txt
    config : config.json
    tokenizer_config : tokenizer_config.json, its keys checked
    lower : do_lower_case of sentence_bert_config.json

    Returns
    -------
    The bytes of tokenizer.json itself if no setting changes it.

    Raises
    ------
    ValueError
        A setting is not supported, or the files contradict each other.
    """
    path, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    if not present(path) and not present(vocabulary):
        return None
    where = folder / "tokenizer_config.json"
    name = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or _BERT[0]
    kind = name.removesuffix("Fast") if isinstance(name, str) else ""
    if kind not in (*_BERT, *_ROBERTA, *_AS_IT_IS, *_UNIGRAM):
        supported = ", ".join((*_BERT, *_ROBERTA, "PreTrainedTokenizerFast", *_UNIGRAM))
        fail(where, "tokenizer_class", name, f"one of {supported}")
    defaults = _DEFAULTS.get(kind, {})
    special = _special_tokens(folder, tokenizer_config, defaults)
    if present(path):
        text = path.read_bytes()
        check_text(text, path)
        given = read_json(path)
        check_keys(given, "tokenizer.json", path)
    elif defaults is _BERT_SPECIAL:
        text, path = b"", vocabulary
        given = _from_vocabulary(vocabulary, special, config)
    else:
        raise FileNotFoundError(f"{folder} has no tokenizer.json, which {name} needs")
    if not isinstance(given.get("model"), dict):
        fail(path, "model", given.get("model"), "an object")
    _check_ids(given, config, path)
    added = _added_tokens(given, folder, tokenizer_config, special, defaults, path)
    made = {**given, "added_tokens": added}
    if kind in _BERT:
        made["normalizer"] = _bert_normalizer(given, tokenizer_config, path, where)
        _check_bert(given, special, added, path, kind)
    elif kind in _ROBERTA:
        _check_roberta(given, tokenizer_config, path, where)
        _check_ends(given, special, added, path, kind)
    elif kind in _UNIGRAM and given["model"].get("type") != "Unigram":
        fail(path, "model.type", given["model"].get("type"), f"Unigram, as the tokenizer_class is {name}")
    if lower:
        made["normalizer"] = _lowercase_first(made["normalizer"])
    _set_sides(made, given, tokenizer_config, path, where)
    inputs = tokenizer_config.get("model_input_names")
    if inputs is not None and (not isinstance(inputs, list) or "attention_mask" not in inputs):
        fail(
            where,
            "model_input_names",
            inputs,
            "a list with attention_mask: without it padding is attended to",
        )
    if text and made == given:
        return text
    return json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()


def read_tokenizer(text: bytes, where: object) -> Tokenizer:
    """A `tokenizers.Tokenizer` from the bytes of a tokenizer.json."""
    from tokenizers import Tokenizer  # a model folder without a tokenizer loads without this package

    check_text(text, where)
    what = f"{where} holds no tokenizer"
    if any(pattern.search(text) for pattern in _NORMALIZED):
        # the steps alone: what they make of added tokens is made with the tokenizer
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what}: {' '.join(str(error).split())[:120]}") from None
        if isinstance(value, dict):
            with tokenizer_errors(what):
                steps = Tokenizer.from_str(json.dumps({**value, **_NO_VOCABULARY}))
            check_bounds(steps, where)
    with tokenizer_errors(what):
        tokenizer = Tokenizer.from_buffer(text)  # without the copies of a str
        tokenizer.no_padding()  # to a length of the file's, which could be 10^8 tokens
    check_bounds(tokenizer, where)
    truncation = tokenizer.truncation
    tokenizer.no_truncation()  # a stride makes windows that overlap: tokens times its length
    with tokenizer_errors(what):
        encoding = tokenizer.encode(_UNKNOWN)
        if truncation is not None:
            tokenizer.enable_truncation(truncation["max_length"], direction=truncation["direction"])
    if any(encoding.type_ids):
        raise ValueError(
            f"{where} has a post_processor with token types other than 0, which are not supported"
        )
    return tokenizer


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Raise what tokenizers raises, plain Exceptions and panics of its Rust code, as a ValueError: "what: reason"."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise ValueError(f"{what}: {' '.join(reason.split())[:300]}") from None


def check_unicode(texts: Sequence[str], prompt: str) -> None:
    """Refuse text that no tokenizer takes, by its place."""
    for name, text in (("the prompt", prompt), *((f"texts[{i}]", text) for i, text in enumerate(texts))):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is not valid Unicode: it holds half of a surrogate pair at character {error.start}"
            ) from None


def check_ids(text: bytes, config: Mapping[str, Any], where: object) -> None:
    """Refuse a tokenizer.json with ids that are not rows of the word embeddings, before its tokenizer is made.

    The time and memory of making it grow with the largest id, which a small file can state. Ids of less than 8 digits
    are not refused here, but when a text has them.
    """
    if _LONG_NUMBER not in text.translate(_DIGITS_TO_ZERO):  # 1 ms; a regular expression takes 10
        return  # 10 ms to parse; ids below 10^8 cost little
    check_text(text, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds no tokenizer: {' '.join(str(error).split())[:120]}") from None
    if isinstance(value, dict):
        _check_ids(value, config, where)


def _check_ids(given: Mapping[str, Any], config: Mapping[str, Any], where: object) -> None:
    for token, number in _ids(given):
        _check_id(token, number, config, where)


def _check_id(token: str, number: int, config: Mapping[str, Any], where: object) -> None:
    rows = config.get("vocab_size")
    if type(rows) is int and not 0 <= number < rows:  # another type is refused by the check of config.json
        raise ValueError(
            f"{where} has the token {quoted(token)} with id {number}, but the word embeddings have {rows} rows "
            "(vocab_size of config.json)"
        )


def _ids(given: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens with the lowest and highest ids of the vocabulary, and all added ones."""
    model = given.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and vocabulary:
        try:
            ends = {min(vocabulary.values()), max(vocabulary.values())}
        except TypeError:
            return  # refused by tokenizers
        for number in (n for n in ends if type(n) is int):
            yield next(t for t, n in vocabulary.items() if n == number), number
    elif isinstance(vocabulary, list) and vocabulary:
        last = vocabulary[-1]
        yield str(last[0]) if isinstance(last, list) and last else "", len(vocabulary) - 1
    added = given.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield str(token.get("content")), token["id"]


# --- what BertTokenizer makes -------------------------------------------------------------------------


def _bert_normalizer(
    given: Mapping[str, Any], tokenizer_config: Mapping[str, Any], path: Path, where: Path
) -> dict[str, Any]:
    stored = given.get("normalizer")
    if stored is not None and (not isinstance(stored, dict) or stored.get("type") != "BertNormalizer"):
        raise ValueError(
            f"{path} has a normalizer that BertTokenizer replaces by its own; to keep it, set tokenizer_class of "
            f"{where.name} to PreTrainedTokenizerFast"
        )
    if stored is not None and stored.get("clean_text", True) is not True:
        fail(path, "normalizer.clean_text", stored["clean_text"], "true, as BertTokenizer sets it")
    options = {
        "handle_chinese_chars": tokenizer_config.get("tokenize_chinese_chars", True),
        "strip_accents": tokenizer_config.get("strip_accents"),
        "lowercase": tokenizer_config.get("do_lower_case", True),
    }
    for key, value in zip(
        ("tokenize_chinese_chars", "strip_accents", "do_lower_case"), options.values(), strict=True
    ):
        if type(value) is not bool and (key != "strip_accents" or value is not None):
            fail(where, key, value, "true or false")
    return {"type": "BertNormalizer", "clean_text": True, **options}


def _check_bert(
    given: Mapping[str, Any], special: Mapping[str, Any], added: list[dict[str, Any]], path: Path, kind: str
) -> None:
    """Refuse what BertTokenizer, or another class of that kind, would replace by something else."""
    model = given["model"]
    for name, value in (
        ("type", "WordPiece"),
        ("unk_token", _content(special["unk_token"])),
        ("continuing_subword_prefix", "##"),
        ("max_input_chars_per_word", 100),
    ):
        if model.get(name, value) != value:
            fail(path, f"model.{name}", model[name], f"{shown(value)}, as {kind} sets it")
    splitter = given.get("pre_tokenizer")
    if splitter is not None and splitter != {"type": "BertPreTokenizer"}:
        fail(path, "pre_tokenizer", splitter, f"BertPreTokenizer, as {kind} sets it")
    _check_ends(given, special, added, path, kind)


def _check_ends(
    given: Mapping[str, Any], special: Mapping[str, Any], added: list[dict[str, Any]], path: Path, kind: str
) -> None:
    """Refuse other tokens around a text than the class puts there."""
    vocabulary = given["model"].get("vocab")
    ids = {token["content"]: token["id"] for token in added} | (
        vocabulary if isinstance(vocabulary, dict) else {}
    )
    ends = [[name, ids.get(name)] for name in (_content(special[key]) for key in ("cls_token", "sep_token"))]
    if _template(given.get("post_processor")) != ends:
        (first, first_id), (last, last_id) = ends
        fail(
            path,
            "post_processor",
            given.get("post_processor"),
            f"{quoted(first)} (id {first_id}) before and {quoted(last)} (id {last_id}) behind the text, with token "
            f"type 0, as {kind} sets it (cls_token, sep_token)",
        )


def _check_roberta(
    given: Mapping[str, Any], tokenizer_config: Mapping[str, Any], path: Path, where: Path
) -> None:
    """Refuse what RobertaTokenizer would replace by something else."""
    model, splitter = given["model"], given.get("pre_tokenizer")
    for name, values in (
        ("type", ("BPE",)),
        ("dropout", (None, 0.0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        *((flag, (None, False)) for flag in ("fuse_unk", "byte_fallback", "ignore_merges")),
    ):
        if model.get(name) not in values:
            fail(path, f"model.{name}", model.get(name), f"{shown(values[0])}, as RobertaTokenizer sets it")
    if given.get("normalizer") is not None:
        fail(path, "normalizer", given["normalizer"], "null, as RobertaTokenizer sets it")
    space = tokenizer_config.get("add_prefix_space", False)
    if type(space) is not bool:
        fail(where, "add_prefix_space", space, "true or false")
    step = splitter if isinstance(splitter, dict) else {}
    is_bytes = step.get("type") == "ByteLevel" and step.get("use_regex", True) is True
    if not is_bytes or step.get("add_prefix_space", True) is not space:
        needs = f"ByteLevel with add_prefix_space {shown(space)}, as {where.name} says"
        fail(path, "pre_tokenizer", splitter, needs)


def _template(processor: Any) -> list[Any] | None:
    """[token, id] that a post processor puts before and behind a text; None for other ones."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return [processor.get("cls"), processor.get("sep")]
    steps = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(steps, list) or len(steps) != 3:
        return None
    try:
        tokens = [step["SpecialToken"] for step in (steps[0], steps[2])]
        types = [*(token["type_id"] for token in tokens), steps[1]["Sequence"]["type_id"]]
        special = processor["special_tokens"]
        return [[t["id"], *special[t["id"]]["ids"]] for t in tokens] if types == [0, 0, 0] else None
    except (KeyError, TypeError):
        return None


def _from_vocabulary(path: Path, special: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a BertTokenizer with the vocabulary of vocab.txt, one token a line."""
    vocabulary: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                _check_id(line.rstrip("\n"), number, config, path)
                vocabulary[line.rstrip("\n")] = number
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    names = {key: _content(special[key]) for key in _BERT_SPECIAL}
    for key in ("unk_token", "cls_token", "sep_token"):
        if names[key] not in vocabulary:
            raise ValueError(f"{path} has no token {quoted(names[key])} ({key})")
    first, last = ({"SpecialToken": {"id": names[key], "type_id": 0}} for key in ("cls_token", "sep_token"))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {
        token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
        for token in (names["cls_token"], names["sep_token"])
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text, last],
            "pair": [first, text, last, second, {"SpecialToken": {"id": names["sep_token"], "type_id": 1}}],
            "special_tokens": tokens,
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": names["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


# --- special and added tokens -------------------------------------------------------------------------


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(
    folder: Path, tokenizer_config: Mapping[str, Any], defaults: Mapping[str, str]
) -> dict[str, Any]:
    """Special tokens by key, as text or objects: of special_tokens_map.json, tokenizer_config.json, the class."""
    path = folder / "special_tokens_map.json"
    merged: dict[str, Any] = dict(defaults)
    sources = [(folder / "tokenizer_config.json", tokenizer_config)]
    if "added_tokens_decoder" not in tokenizer_config and present(path):
        stored = read_json(path)
        check_keys(stored, "special_tokens_map.json", path)
        sources.append((path, stored))
    for where, source in sources:
        for name in (*_SPECIAL, "additional_special_tokens", "extra_special_tokens"):
            value = source.get(name)
            if value is None:
                continue
            several = name not in _SPECIAL
            if isinstance(value, dict) and several:  # by name
                value = list(value.values())
            tokens = value if several and isinstance(value, list) else [value]
            if not all(isinstance(_content(token), str) for token in tokens):
                fail(where, name, value, "a token" if not several else "a list of tokens")
            merged[name] = value
    return merged


def _added_tokens(
    given: Mapping[str, Any],
    folder: Path,
    tokenizer_config: Mapping[str, Any],
    special: Mapping[str, Any],
    defaults: Mapping[str, str],
    path: Path,
) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json, and those of its vocabulary that the other files call special."""
    added = given.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in added
    ):
        fail(path, "added_tokens", added, "a list of tokens")
    contents = {token["content"]: token for token in added}
    decoder = tokenizer_config.get("added_tokens_decoder")
    if decoder is not None:
        _check_decoder(decoder, added, folder / "tokenizer_config.json", path)
    vocabulary = given["model"].get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    for word, number in vocabulary.items():
        if type(number) is not int:
            raise ValueError(f"{path} has the token {quoted(word)} with id {shown(number)}; needs an integer")
    for name, number in ({} if decoder is not None else read_optional(folder / "added_tokens.json")).items():
        if contents.get(name, {}).get("id", vocabulary.get(name)) != number:
            raise ValueError(
                f"{folder / 'added_tokens.json'} has the token {quoted(name)} with id {shown(number)}, which "
                f"{path.name} does not have; save the tokenizer again"
            )
    result = list(added)
    for key, value in special.items():
        for token in value if isinstance(value, list) else [value]:
            content = _content(token)
            if content in contents:
                continue
            if content not in vocabulary:
                if content == defaults.get(key):
                    continue  # of the class
                raise ValueError(
                    f"the {key} of {folder} is {quoted(content)}, which {path.name} does not have; save the "
                    "tokenizer again"
                )
            flags = {flag: bool(isinstance(token, dict) and token.get(flag, False)) for flag in _FLAGS}
            made = {"id": vocabulary[content], "content": content, **flags, "special": True}
            contents[content] = made
            result.append(made)
    return sorted(result, key=lambda token: token["id"]) if len(result) > len(added) else added


def _check_decoder(decoder: Any, added: list[dict[str, Any]], where: Path, path: Path) -> None:
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        fail(where, "added_tokens_decoder", decoder, "an object of tokens by id")
    stored = {str(token.get("id")): token for token in added}
    for number in {**decoder, **stored}:
        a, b = decoder.get(number), stored.get(number)
        names = ("content", "special", *_FLAGS)
        if a is None or b is None or any(not same(a.get(n, False), b.get(n, False)) for n in names):
            token = quoted(str((a or b or {}).get("content")))
            raise ValueError(
                f"{where}: added_tokens_decoder disagrees with {path.name} about the token {token} with id {number}; "
                "save the tokenizer again"
            )


# --- the rest -----------------------------------------------------------------------------------------


def _lowercase_first(normalizer: Any) -> Any:
    """A Lowercase step before a normaliser, unless it has one."""
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    steps = (
        normalizer.get("normalizers", [])
        if kind == "Sequence"
        else []
        if normalizer is None
        else [normalizer]
    )
    if any(isinstance(step, dict) and step.get("type") == "Lowercase" for step in steps):
        return normalizer
    return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}


def _set_sides(
    made: dict[str, Any],
    given: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    path: Path,
    where: Path,
) -> None:
    """Put the side of truncation into the tokenizer, and refuse padding on the left."""
    padding, truncation = given.get("padding"), given.get("truncation")
    direction = padding.get("direction", "Right") if isinstance(padding, dict) else "Right"
    if direction != "Right" and tokenizer_config.get("padding_side") != "right":
        fail(path, "padding.direction", direction, "Right: positions would depend on the batch")
    stored = truncation.get("direction", "Right") if isinstance(truncation, dict) else "Right"
    side = tokenizer_config.get("truncation_side", str(stored).lower())
    if side not in ("left", "right"):
        fail(where, "truncation_side", side, "left or right")
    if side != str(stored).lower():
        options = (
            truncation
            if isinstance(truncation, dict)
            else {"max_length": 512, "strategy": "LongestFirst", "stride": 0}
        )
        made["truncation"] = {**options, "direction": side.capitalize()}
