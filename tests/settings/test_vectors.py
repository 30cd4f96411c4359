"""Settings of a folder: against vectors of sentence-transformers (`record.py`), and through `compress`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.load import load
from tests import real
from tests.test_compress_model import make_model

from .cases import CASES, TEXTS, make

#: Largest difference of a component, relative to the largest component. PyTorch sums in another order: 1.5e-6 was
#: measured, where 1 - cosine is 2e-12.
COMPONENT = 1e-5
#: cases whose edits do not fit the small model of `make_model`
LARGE = (
    "vocab.txt",
    "vocab.txt, cased",
    "additional_special_tokens",
    "num_hidden_layers",
    "num_attention_heads",
)


@cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("vectors.npz")) as file:
        return dict(file)


def test_every_case_is_recorded() -> None:
    assert recorded().keys() - {"versions"} == CASES.keys()
    assert [str(v).split()[0] for v in recorded()["versions"]] == [
        "sentence_transformers",
        "transformers",
        "torch",
    ]


@pytest.mark.parametrize("name", CASES)
def test_vectors_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    case, expected = CASES[name], recorded()[name]
    result = load(make(tmp_path / "m", real.MODEL_DIR, case.edits)).embed(TEXTS, **case.call)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= COMPONENT * np.abs(expected).max()


def test_cases_differ_in_their_vectors() -> None:
    """No setting could be ignored unnoticed: all cases but those that say the same have vectors of their own."""
    same = {
        "as version 6 saves it": "as it is",
        "prompts without default": "as it is",
        "no prompt instead of the default": "as it is",
        "prompt that is null": "as it is",
        "query without prompts": "as it is",
        "older keys, none": "as it is",
        "normalizer of tokenizer.json, replaced": "as it is",
        "no tokenizer_config.json": "as it is",
        "vocab.txt": "as it is",
        "mask_token beside tokenizer.json": "as it is",
        "mask_token of special_tokens_map.json": "as it is",
        "transformer in a folder": "as it is",
        "prompt by name instead of the default": "prompt by name",
        "prompt not pooled, older keys": "prompt not pooled, mean",
        "older keys beside pooling_mode": "cls",
        "mean_sqrt_len_tokens": "as it is",  # normalised
        "model_max_length beyond the positions": "no length",
        "truncation of tokenizer.json": "truncation_side",
        "normalizer of tokenizer.json, kept": "cased",
        "vocab.txt, cased": "cased",
        "accents kept": "cased, do_lower_case of sentence_bert_config.json",
        "normalizer of tokenizer.json, do_lower_case": "cased, do_lower_case of sentence_bert_config.json",
    }
    vectors = recorded()
    distinct = [name for name in CASES if name not in same]
    for name, other in same.items():
        np.testing.assert_allclose(vectors[name], vectors[other], atol=2e-6)
    for i, name in enumerate(distinct):
        for other in distinct[:i]:
            if vectors[name].shape == vectors[other].shape:
                difference = np.abs(vectors[name] - vectors[other]).max()
                assert difference > 10 * COMPONENT * np.abs(vectors[name]).max(), (name, other)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LARGE])
def test_settings_survive_compress(name: str, tmp_path: Path) -> None:
    """sparse-f32 would make every tensor larger, so all stay dense: only settings can change the vectors."""
    small, case = make_model(tmp_path / "small"), CASES[name]
    for file in ("tokenizer_config.json", "special_tokens_map.json", "config_sentence_transformers.json"):
        (small / file).write_bytes((real.MODEL_DIR / file).read_bytes())
    folder = make(tmp_path / "m", small, case.edits)
    compress_model(folder, tmp_path / "out", codes="sparse-f32")
    before, after = load(folder), load(tmp_path / "out")
    np.testing.assert_array_equal(after.embed(TEXTS, **case.call), before.embed(TEXTS, **case.call))
    assert after.prompts == before.prompts
    assert after.default_prompt_name == before.default_prompt_name
