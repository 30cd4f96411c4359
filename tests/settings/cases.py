"""Model folders that differ from MiniLM's in one setting each, with the calls and texts that show the difference.

Needs only the standard library, so that `record.py` can use it where sentence-transformers is installed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

#: Text with capitals, accents, CJK characters and special tokens; a short one; and one of more than 512 tokens: the
#: openings of Moby-Dick, Pride and Prejudice and the Gettysburg Address.
TEXTS = (
    "The Cat's Cradle of Zürich: naïve Café-goers SAT reading 東京 guides [MASK], i.e. <QUERY> Running past "
    "McDonald's",
    "interest rates rose",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, "
    "and nothing particular to interest me on shore, I thought I would sail about a little and see the watery"
    " part of the world. It is a way I have of driving off the spleen and regulating the circulation. "
    "Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul;"
    " whenever I find myself involuntarily pausing before coffin warehouses, and bringing up the rear of "
    "every funeral I meet; and especially whenever my hypos get such an upper hand of me, that it requires a "
    "strong moral principle to prevent me from deliberately stepping into the street, and methodically "
    "knocking people's hats off, then, I account it high time to get to sea as soon as I can. This is my "
    "substitute for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; I "
    "quietly take to the ship. There is nothing surprising in this. If they but knew it, almost all men in "
    "their degree, some time or other, cherish very nearly the same feelings towards the ocean with me. It is"
    " a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of"
    " a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered the rightful property of some one or other of their daughters. Four score and seven years ago"
    " our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to the "
    "proposition that all men are created equal. Now we are engaged in a great civil war, testing whether "
    "that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for"
    " those who here gave their lives that that nation might live. It is altogether fitting and proper that "
    "we should do this. But, in a larger sense, we can not dedicate, we can not consecrate, we can not hallow"
    " this ground. The brave men, living and dead, who struggled here, have consecrated it, far above our "
    "poor power to add or detract. The world will little note, nor long remember what we say here, but it can"
    " never forget what they did here. It is for us the living, rather, to be dedicated here to the "
    "unfinished work which they who fought here have thus far so nobly advanced.",
)

Edit = Callable[[Path], object]


class Case(NamedTuple):
    """Changes to a folder, and arguments of `encode` and `embed`."""

    edits: tuple[Edit, ...] = ()
    call: dict[str, str] = {}  # noqa: RUF012  never changed


def make(folder: Path, model: Path, edits: tuple[Edit, ...]) -> Path:
    """MiniLM's folder with links to its weights, changed."""
    shutil.copytree(
        model,
        folder,
        copy_function=lambda a, b: (os.symlink if a.endswith(".safetensors") else shutil.copyfile)(a, b),
        ignore=shutil.ignore_patterns("data_config.json", "*.md", ".gitattributes"),
    )
    for edit in edits:
        edit(folder)
    return folder


def change(file: str, edit: Callable[[Any], object]) -> Edit:
    """Edit the value of a JSON file; a file that is not there is an empty object."""

    def changed(folder: Path) -> None:
        path = folder / file
        value = json.loads(path.read_text("utf-8")) if path.exists() else {}
        edit(value)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value), "utf-8")

    return changed


def sets(file: str, **values: Any) -> Edit:
    """Set keys of a JSON file."""
    return change(file, lambda value: value.update(values))


def drops(file: str, *keys: str) -> Edit:
    """Remove keys of a JSON file."""
    return change(file, lambda value: [value.pop(key, None) for key in keys])


def writes(file: str, value: Any) -> Edit:
    """Replace a JSON file."""

    def written(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(value), "utf-8")

    return written


def removes(*files: str) -> Edit:
    return lambda folder: [(folder / file).unlink() for file in files]


CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
BERT, LIBRARY, POOLING = (
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
SPECIAL = "special_tokens_map.json"

PROMPTS = sets(LIBRARY, prompts={"query": "query: ", "passage": "passage: "})
DEFAULT = sets(LIBRARY, default_prompt_name="query")
CASED = sets(TOKENIZER_CONFIG, do_lower_case=False)
FAST = sets(TOKENIZER_CONFIG, tokenizer_class="PreTrainedTokenizerFast")


def pools(*modes: str, **values: Any) -> Edit:
    """1_Pooling/config.json as sentence-transformers 6 writes it."""
    mode = modes[0] if len(modes) == 1 else list(modes)
    return writes(
        POOLING, {"embedding_dimension": 384, "pooling_mode": mode, "include_prompt": True, **values}
    )


def _move_transformer(folder: Path) -> None:
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", LIBRARY):
            path.rename(folder / "0_Transformer" / path.name)
    change("modules.json", lambda modules: modules[0].update(path="0_Transformer"))(folder)


def _normalizer(**values: Any) -> Edit:
    return change(TOKENIZER, lambda tokenizer: tokenizer["normalizer"].update(values))


def _added(keep: Callable[[Any], bool]) -> Edit:
    return change(TOKENIZER, lambda t: t.update(added_tokens=[a for a in t["added_tokens"] if keep(a)]))


def _as_version_6(folder: Path) -> None:
    """The folder as sentence-transformers 6.2 saves it."""
    kinds = (
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "sentence_transformers.base.modules.normalize.Normalize",
    )
    change("modules.json", lambda modules: [m.update(type=k) for m, k in zip(modules, kinds, strict=True)])(
        folder
    )
    pools("mean")(folder)
    writes(
        "2_Normalize/config.json",
        {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    )(folder)
    writes(
        BERT,
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    )(folder)
    sets(
        TOKENIZER_CONFIG,
        **{
            "backend": "tokenizers",
            "is_local": True,
            "max_length": 128,
            "model_max_length": 256,
            "stride": 0,
        },
        **{
            "pad_to_multiple_of": None,
            "pad_token_type_id": 0,
            "padding_side": "right",
            "truncation_side": "right",
        },
        truncation_strategy="longest_first",
    )(folder)
    sets(
        LIBRARY,
        model_type="SentenceTransformer",
        prompts={"query": "", "document": ""},
        default_prompt_name=None,
        similarity_fn_name="cosine",
    )(folder)
    sets(CONFIG, dtype="float32", is_decoder=False, add_cross_attention=False, tie_word_embeddings=True)(
        folder
    )


CASES: dict[str, Case] = {
    "as it is": Case(),
    "as version 6 saves it": Case((_as_version_6,)),
    # prompts
    "default prompt": Case((PROMPTS, DEFAULT)),
    "prompts without default": Case((PROMPTS,)),
    "prompt by name": Case((PROMPTS,), {"prompt_name": "passage"}),
    "prompt by name instead of the default": Case((PROMPTS, DEFAULT), {"prompt_name": "passage"}),
    "prompt by its text": Case((PROMPTS, DEFAULT), {"prompt": "Represent the Text: "}),
    "no prompt instead of the default": Case((PROMPTS, DEFAULT), {"prompt": ""}),
    "prompt that is null": Case((sets(LIBRARY, prompts={"query": None}), DEFAULT)),
    "query without prompts": Case((), {"prompt_name": "query"}),
    "prompt not pooled, mean": Case((PROMPTS, DEFAULT, pools("mean", include_prompt=False))),
    "prompt not pooled, cls": Case((PROMPTS, DEFAULT, pools("cls", include_prompt=False))),
    "prompt not pooled, max": Case((PROMPTS, DEFAULT, pools("max", include_prompt=False))),
    "prompt not pooled, lasttoken": Case((PROMPTS, DEFAULT, pools("lasttoken", include_prompt=False))),
    "prompt not pooled, weightedmean": Case((PROMPTS, DEFAULT, pools("weightedmean", include_prompt=False))),
    "prompt not pooled, older keys": Case((PROMPTS, DEFAULT, sets(POOLING, include_prompt=False))),
    # pooling
    "cls": Case((pools("cls"),)),
    "max": Case((pools("max"),)),
    "mean_sqrt_len_tokens": Case((pools("mean_sqrt_len_tokens"),)),
    "weightedmean": Case((pools("weightedmean"),)),
    "lasttoken": Case((pools("lasttoken"),)),
    "several modes": Case((pools("mean", "cls"),)),
    "older keys, several modes": Case(
        (sets(POOLING, pooling_mode_cls_token=True, pooling_mode_lasttoken=True),)
    ),
    "older keys beside pooling_mode": Case((sets(POOLING, pooling_mode="cls"),)),
    "older keys, none": Case((sets(POOLING, pooling_mode_mean_tokens=False),)),
    # modules
    "not normalized": Case((change("modules.json", lambda modules: modules.pop()),)),
    "no modules.json": Case((removes("modules.json"),)),
    "transformer in a folder": Case((_move_transformer,)),
    "truncate_dim": Case((sets(LIBRARY, truncate_dim=100),)),
    # lengths
    "max_seq_length": Case((sets(BERT, max_seq_length=20),)),
    "max_seq_length null": Case(
        (sets(BERT, max_seq_length=None), sets(TOKENIZER_CONFIG, model_max_length=24))
    ),
    "no length": Case((removes(BERT), drops(TOKENIZER_CONFIG, "model_max_length"))),
    "model_max_length beyond the positions": Case(
        (removes(BERT), sets(TOKENIZER_CONFIG, model_max_length=10**30))
    ),
    "max_len": Case(
        (removes(BERT), drops(TOKENIZER_CONFIG, "model_max_length"), sets(TOKENIZER_CONFIG, max_len=28))
    ),
    "truncation_side": Case((sets(BERT, max_seq_length=20), sets(TOKENIZER_CONFIG, truncation_side="left"))),
    "truncation of tokenizer.json": Case(
        (
            sets(BERT, max_seq_length=20),
            change(TOKENIZER, lambda tokenizer: tokenizer["truncation"].update(direction="Left")),
        )
    ),
    # letters
    "cased": Case((CASED,)),
    "cased, do_lower_case of sentence_bert_config.json": Case((CASED, sets(BERT, do_lower_case=True))),
    "strip_accents": Case((CASED, sets(TOKENIZER_CONFIG, strip_accents=True))),
    "accents kept": Case((sets(TOKENIZER_CONFIG, strip_accents=False),)),
    "tokenize_chinese_chars": Case((sets(TOKENIZER_CONFIG, tokenize_chinese_chars=False),)),
    "normalizer of tokenizer.json, replaced": Case((_normalizer(lowercase=False, strip_accents=False),)),
    "normalizer of tokenizer.json, kept": Case((FAST, _normalizer(lowercase=False))),
    "normalizer of tokenizer.json, do_lower_case": Case(
        (FAST, _normalizer(lowercase=False), sets(BERT, do_lower_case=True))
    ),
    "no normalizer": Case((FAST, sets(TOKENIZER, normalizer=None))),
    "no tokenizer_config.json": Case((_normalizer(lowercase=False), removes(TOKENIZER_CONFIG))),
    "vocab.txt": Case((removes(TOKENIZER),)),
    "vocab.txt, cased": Case((removes(TOKENIZER), CASED)),
    # special tokens
    "mask_token beside tokenizer.json": Case((_added(lambda token: token["content"] != "[MASK]"),)),
    "mask_token of special_tokens_map.json": Case(
        (
            FAST,
            _added(lambda token: token["content"] != "[MASK]"),
            drops(TOKENIZER_CONFIG, "mask_token"),
        )
    ),
    "additional_special_tokens": Case((sets(TOKENIZER_CONFIG, additional_special_tokens=["rest"]),)),
    # config.json
    "relu": Case((sets(CONFIG, hidden_act="relu"),)),
    "gelu_new": Case((sets(CONFIG, hidden_act="gelu_new"),)),
    "layer_norm_eps": Case((sets(CONFIG, layer_norm_eps=1e-2),)),
    "num_hidden_layers": Case((sets(CONFIG, num_hidden_layers=2),)),
    "num_attention_heads": Case((sets(CONFIG, num_attention_heads=6),)),
}
