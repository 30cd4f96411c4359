"""Folders that must be refused by `load` and `compress_model`: at once, in one line, by the names of file and key."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import rbe_gpu as rbe
from rbe_gpu.container import load_file, save_file
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.stored_tokenizer import take_tokenizer
from rbe_gpu.models.tokenizer import read_tokenizer
from tests import real
from tests.settings.cases import TOKENIZER, change, make
from tests.test_compress_model import make_model

from .model_folders import BYTES, DEEP, FOLDERS, build, replaced


@pytest.mark.parametrize("name", FOLDERS)
def test_refused(name: str, tmp_path: Path) -> None:
    bad = FOLDERS[name]
    folder = build(tmp_path / "m", bad, real.MODEL_DIR, make_model)
    for refuse in (rbe.load, lambda f: compress_model(f, tmp_path / "out", codes="dense-int4")):
        with pytest.raises(ValueError, match=re.escape(bad.words[-1])) as error:
            refuse(folder)
        message = str(error.value)
        assert "\n" not in message
        assert len(message) < 700
        for words in bad.words:
            assert words in message
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "name",
    [
        *("modules.json", "config.json", "1_Pooling/config.json", "sentence_bert_config.json", TOKENIZER),
        *("config_sentence_transformers.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "model.safetensors", "adapter_config.json"),
    ],
)
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_file_that_cannot_be_read_is_not_ignored(kind: str, name: str, tmp_path: Path) -> None:
    """A folder of links of which not all were downloaded: without modules.json vectors would not be normalised."""
    folder = make(tmp_path / "m", real.MODEL_DIR, ())
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "missing":
        path.symlink_to(tmp_path / "blob")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        rbe.load(folder)


def test_the_folder_itself_is_accepted(tmp_path: Path) -> None:
    """Each case fails for its change alone."""
    assert rbe.load(make(tmp_path / "m", real.MODEL_DIR, ())).embed(["a text"]).shape == (1, 384)
    assert rbe.load(make_model(tmp_path / "small")).embed(["a text"]).shape == (1, 96)


def test_float64_weights(tmp_path: Path) -> None:
    """`load` refuses them; `compress` without calibration converts them."""
    from tests.test_compress_model import cut_tensors

    tensors = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in cut_tensors().items()}
    folder = make_model(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* is F64; weights must be one of F32"):
        rbe.load(folder)
    with pytest.raises(ValueError, match="is F64; weights must be one of F32"):
        compress_model(folder, tmp_path / "out", ratio=4, calibrate=["a text"])
    compress_model(folder, tmp_path / "out", codes="dense-int4")
    assert np.isfinite(rbe.load(tmp_path / "out").embed(["a text"])).all()


@pytest.mark.parametrize(("text", "at"), [("\ud83d", 0), ("fine \udcff", 5), ("\ude00\ud83d", 0)])
def test_text_that_is_not_unicode(text: str, at: int, tmp_path: Path) -> None:
    model = rbe.load(make_model(tmp_path / "m"))
    with pytest.raises(ValueError, match=rf"texts\[1\] is not valid Unicode: .* at character {at}"):
        model.embed(["fine", text])
    with pytest.raises(ValueError, match="the prompt is not valid Unicode"):
        model.embed(["fine"], prompt=text)
    assert model.embed(["fine", "\U0001f600"]).shape == (2, 96)


def test_ids_beyond_the_table_in_texts(tmp_path: Path) -> None:
    """Of a tokenizer that was given to the model, not read with it."""
    from rbe_gpu.models import BertEncoder
    from tests.test_compress_model import VOCABULARY, cut_tensors

    config = rbe.load(make_model(tmp_path / "m")).config
    model = BertEncoder(cut_tensors(), config, real.tokenizer())
    with pytest.raises(ValueError, match=rf"texts\[1\] has a token with id \d+, .* {VOCABULARY} rows"):
        model.embed(["the", "zebra crossing"])
    with pytest.raises(ValueError, match=r"texts\[0\] has a token with id"):
        rbe.calibrate(model, ["zebra crossing"])


@pytest.mark.parametrize(
    "padding", [{"strategy": {"Fixed": 10**8}}, {"strategy": "BatchLongest", "pad_to_multiple_of": 10**8}]
)
def test_padding_of_a_tokenizer_has_no_effect(padding: dict[str, Any], tmp_path: Path) -> None:
    """It took a minute and 10 GB."""
    folder = make(tmp_path / "m", real.MODEL_DIR, ())
    change(TOKENIZER, lambda t: t["padding"].update(padding))(folder)
    text = (folder / TOKENIZER).read_bytes()
    start = time.process_time()
    tokenizer = read_tokenizer(text, folder)
    assert time.process_time() - start < 2.0
    assert len(tokenizer.encode("the").ids) == 3


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        ([{"type": "Prepend", "prepend": "\u2581"}, replaced(" ", "\u2581")], []),  # Llama
        ([replaced(chr(0x1F600 + i), f" grinning face {i} ") for i in range(60)], [BYTES]),
    ],
)
def test_steps_that_make_a_text_longer(normalizer: list[Any], pre_tokenizer: list[Any]) -> None:
    made = json.loads((real.MODEL_DIR / TOKENIZER).read_text("utf-8"))
    made["normalizer"] = {"type": "Sequence", "normalizers": normalizer}
    made["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**step, "add_prefix_space": False} for step in pre_tokenizer],
    }
    read_tokenizer(json.dumps(made).encode(), "m")


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    """A panic of Rust code is no Exception; one that was given to the model is refused when a text meets it."""
    from tokenizers import Tokenizer

    from rbe_gpu.models import BertEncoder
    from tests.test_compress_model import cut_tensors

    made = json.loads((real.MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    made["post_processor"]["special_tokens"].pop("[SEP]")
    config = rbe.load(make_model(tmp_path / "m")).config
    model = BertEncoder(cut_tensors(), config, Tokenizer.from_str(json.dumps(made)))
    with pytest.raises(
        ValueError, match=r"^the tokenizer does not take these texts: no entry found for key$"
    ):
        model.embed(["the"])
    with pytest.raises(ValueError, match=r"^the tokenizer does not take the prompt: "):
        model.prompt_length("a ")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_name": "passage"}, ValueError, "no prompt 'passage'; it has 'query', 'document'"),
        ({"prompt_name": 1}, TypeError, "prompt_name is a int"),
        ({"prompt": b"query"}, TypeError, "prompt is a bytes"),
        ({"prompt": "a", "prompt_name": "query"}, ValueError, "both given"),
    ],
)
def test_prompts_that_are_not_there(
    arguments: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        rbe.load(make_model(tmp_path / "m")).embed(["a text"], **arguments)


COMPRESSED = {
    "prompts": ({"prompts": ["query: "]}, "prompts"),
    "default prompt": ({"default_prompt_name": "passage"}, "default_prompt_name"),
    "truncate_dim": ({"truncate_dim": -3}, "truncate_dim"),
    "pooling": ({"pooling": {"pooling_mode": "none"}}, "pooling_mode"),
    "decoder": ({"config": {"is_decoder": True}}, "is_decoder"),
    "id of 2^31": ({"tokenizer": {"model": {"vocab": {"zebra": 2**31}}}}, "zebra"),
    "nested tokenizer": ({"tokenizer": DEEP}, "nested too deeply"),
    "no unknown token": (
        {"tokenizer": {"model": {"vocab": {"[CLS]": 101, "[SEP]": 102, "a": 103}}}},
        "[UNK]",
    ),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_files(name: str, tmp_path: Path) -> None:
    """What a folder must not say, a compressed file must not say either."""
    changes, words = COMPRESSED[name]
    compress_model(make_model(tmp_path / "m"), tmp_path / "good", codes="dense-int4")
    tensors, config = load_file(tmp_path / "good")
    assert rbe.load(tmp_path / "good").embed(["a"]).shape == (1, 96)
    changed = {**config, **{k: v for k, v in changes.items() if k not in ("tokenizer", "config")}}
    changed["config"] = {**config["config"], **changes.get("config", {})}
    text, _ = take_tokenizer(tensors, tmp_path / "good")
    edit = changes.get("tokenizer")
    if isinstance(edit, dict):
        tokenizer = json.loads(text)
        tokenizer["model"].update(edit["model"])
        text = json.dumps(tokenizer).encode()
    elif edit is not None:
        text = edit.encode()
    tensors["tokenizer.json.zst"] = np.frombuffer(zstandard.compress(text), np.uint8)
    save_file(tmp_path / "bad", tensors, changed)
    start = time.process_time()
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        rbe.load(tmp_path / "bad").embed(["a"])
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 2.0
