"""Folders of decoders: tokens, templates and settings are honoured, or refused by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.load import load

from . import gguf_files
from .architectures.decoder_cases import write_with_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_with_tokenizer(tmp_path / "model")


def change(path: Path, **values: Any) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, **values}))


@pytest.mark.parametrize("architecture", gguf_files.ARCHITECTURES)
def test_every_architecture_of_gguf_generates(architecture: str, tmp_path: Path) -> None:
    """From the file itself, and from what it is compressed to."""
    path = gguf_files.small(tmp_path / "m.gguf", architecture)
    dense = load(path)
    result = dense.generate([[1, 2, 3]], 5, ignore_eos=True)[0]
    assert len(result.ids) == 5
    compress_model(path, tmp_path / "c", codes="dense-int12", transform="none")
    assert load(tmp_path / "c").settings == dense.settings


def test_the_tokens_of_a_chat_template(folder: Path, tmp_path: Path) -> None:
    """Those that tokenizer_config.json names, also in a compressed file; without names those of the ids."""
    config = folder / "tokenizer_config.json"
    change(
        config, chat_template="{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ messages[0].content }}"
    )
    change(folder / "config.json", bos_token_id=0, eos_token_id=[2, 3])
    user = [{"role": "user", "content": "x"}]

    def rendered(path: Path) -> str:
        model = load(path)
        assert model.chat_template is not None
        return model.chat_template.render(user, model.special_tokens)

    change(config, bos_token={"content": "<s>"}, eos_token="<unk>")
    compress_model(folder, tmp_path / "c", codes="dense-int8", transform="none")
    for path in (folder, tmp_path / "c"):
        assert rendered(path) == "<s>|<unk>|True|x"
    settings = json.loads(config.read_text())
    del settings["bos_token"], settings["eos_token"]
    config.write_text(json.dumps(settings))
    assert rendered(folder) == "||True|x"  # as in transformers: the file names none


def test_templates_by_name(folder: Path) -> None:
    template = [
        {"name": "tools", "template": "a"},
        {"name": "default", "template": "b"},
        {"name": [], "template": 3},
    ]
    change(folder / "tokenizer_config.json", chat_template=template)
    assert load(folder).chat_template.source == "b"
    change(folder / "tokenizer_config.json", chat_template=3)
    with pytest.raises(ValueError, match="chat_template=3; needs a text"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class=.*; needs one of"),
        ("tokenizer_config.json", {"eos_token": "the"}, 'eos_token "the", which is not in added_tokens'),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": ["in"]},
            'extra_special_tokens "in", which is not',
        ),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": [3]},
            "additional_special_tokens=3; needs a token",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"content": "z"}}},
            'added_tokens_decoder "z"',
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": []}}}, "added_tokens_decoder="),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}, "needs an object of tokens by id"),
        ("tokenizer_config.json", {"add_bos_token": True}, "add_bos_token=true; needs false"),
        ("tokenizer_config.json", {"add_eos_token": 1}, "add_eos_token=1; needs true or false"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
        ("tokenizer_config.json", {"unheard_of": 1}, 'unknown key "unheard_of"'),
        ("tokenizer.json", {"added_tokens": 5}, "added_tokens=5; needs a list of tokens"),
        ("tokenizer.json", {"post_processor": {"processors": 5}}, "holds no tokenizer"),
        ("generation_config.json", {"num_beams": 2}, "num_beams=2: not supported"),
        ("generation_config.json", {"do_sample": True, "top_p": 0.0}, "top_p=0.0"),
        ("adapter_config.json", {}, "adapters are not supported"),
        (
            "config.json",
            {"vocab_size": 9},
            r"model.embed_tokens.weight has shape \(269, 64\), config.json says \(9, 64\)",
        ),
    ],
)
def test_refusals(folder: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    """By `load`, and by `compress_model` before it writes anything."""
    change(folder / file, **values)
    with pytest.raises(ValueError, match=message):
        load(folder)
    with pytest.raises(ValueError, match=message):
        compress_model(folder, tmp_path / "c", codes="dense-int8")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"chat_template": 5}, "chat_template, which is not a text"),
        ({"generation": []}, "generation, which is not an object"),
        ({"generation": {"num_beams": 2}}, "num_beams=2"),
        ({"special_tokens": {"bos_token": 5}}, "special_tokens, which are not texts"),
        ({"dense": []}, "dense without pooling"),
    ],
)
def test_settings_of_a_compressed_file(
    folder: Path, tmp_path: Path, stored: dict[str, Any], message: str
) -> None:
    from rbe_gpu.container import load_file, save_file

    compress_model(folder, tmp_path / "c", codes="dense-int8", transform="none")
    tensors, config = load_file(tmp_path / "c")
    save_file(tmp_path / "changed", tensors, {**config, **stored})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "changed")
