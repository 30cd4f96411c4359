"""RBETransformer in a `SentenceTransformer`: a stand-in that makes the same calls, and the library if it is there."""

from __future__ import annotations

import copy
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.models.compress import compress_model

from . import real
from .test_compress_model import make_model

torch = pytest.importorskip(
    "torch", reason="the integration needs PyTorch, which `make test` installs with the baselines"
)

from rbe_gpu.integrations.sentence_transformers import RBETransformer  # noqa: E402


class StandIn:
    """What sentence-transformers 6.2 calls: its `encode`, `save` and constructor, for one module on one device."""

    def __init__(
        self,
        folder: Any = None,
        *,
        modules: Any = None,
        prompts: Any = None,
        default_prompt_name: str | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        if folder is not None:
            assert trust_remote_code
            (entry,) = json.loads((Path(folder) / "modules.json").read_text())
            module, _, name = entry["type"].rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            modules = [cls.load(str(folder), subfolder=entry["path"], token=None, backend="torch")]
        (self.module,) = modules
        self.prompts = {"query": "", "document": "", **(prompts or {})}
        self.default_prompt_name = default_prompt_name
        self.module.to(device)

    def __getitem__(self, index: int) -> Any:
        return (self.module,)[index]

    def get_embedding_dimension(self) -> int:
        return self.module.get_embedding_dimension()

    @torch.inference_mode()
    def encode(
        self,
        texts: list[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        output_value: str = "sentence_embedding",
    ) -> Any:
        prompt_name = prompt_name or self.default_prompt_name
        if prompt is None and prompt_name is not None:
            prompt = self.prompts[prompt_name]
        self.module.eval()
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows: dict[int, Any] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            features = self.module.preprocess([texts[i] for i in batch], prompt=prompt)
            out = self.module({name: getattr(v, "clone", lambda v=v: v)() for name, v in features.items()})
            values = out[output_value]
            if output_value == "token_embeddings":
                values = [v[: int(m.sum())] for v, m in zip(values, out["attention_mask"], strict=True)]
            rows.update(zip(batch, values, strict=True))
        values = [rows[i] for i in range(len(texts))]
        return values if output_value == "token_embeddings" else torch.stack(values).numpy()

    def save(self, folder: str) -> None:
        kind = type(self.module)
        path = Path(folder) / f"0_{kind.__name__}"
        path.mkdir(parents=True, exist_ok=True)
        self.module.save(str(path), safe_serialization=True)
        modules = [{"idx": 0, "name": "0", "path": path.name, "type": f"{kind.__module__}.{kind.__name__}"}]
        (Path(folder) / "modules.json").write_text(json.dumps(modules))


@pytest.fixture(params=["stand-in", "library"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "stand-in":
        return StandIn
    if find_spec("sentence_transformers") is None:
        pytest.skip(
            "sentence-transformers is not installed (docs/pytorch.md names the version it was tried with)"
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("sentence_transformers").SentenceTransformer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentence_transformers")
    out = folder / "small.rbe.safetensors"
    compress_model(make_model(folder / "model"), out, grade="A")
    return out


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ["one", "", *real.texts()[:40], "word " * 300]


def test_the_vectors_are_those_of_embed(library: Any, file: Path, texts: list[str]) -> None:
    model, encoder = library(modules=[RBETransformer(file)], device="cpu"), rbe.load(file)
    want = encoder.embed(texts)
    got = model.encode(texts)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    assert model.get_embedding_dimension() == want.shape[1] == encoder.embedding_size
    np.testing.assert_array_equal(
        model.encode(texts[:3], prompt="query: "), encoder.embed(texts[:3], prompt="query: ")
    )
    tokens = model.encode(texts[:3], output_value="token_embeddings")
    assert [len(t) for t in tokens] == [len(ids) for ids in encoder.token_ids(texts[:3])]


def test_the_longest_text_may_be_set(library: Any, file: Path, texts: list[str]) -> None:
    model = library(modules=[RBETransformer(file, max_seq_length=9)], device="cpu")
    assert model[0].max_seq_length == 9
    assert max(map(len, model.encode(texts, output_value="token_embeddings"))) == 9
    model[0].max_seq_length = 12
    assert max(map(len, model.encode(texts, output_value="token_embeddings"))) == 12
    for wrong in (2, 10**6, 5.0):
        with pytest.raises(ValueError, match="max_seq_length="):
            model[0].max_seq_length = wrong


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "lasttoken", "weightedmean"])
def test_prompts_that_are_not_pooled(file: Path, texts: list[str], pooling: str) -> None:
    module, encoder = RBETransformer(file), rbe.load(file)
    for model in (module.encoder, encoder):
        model.pooling, model.include_prompt = (pooling, "mean"), False
    want = encoder.embed(texts[:8], prompt="a query: ")
    np.testing.assert_array_equal(StandIn(modules=[module]).encode(texts[:8], prompt="a query: "), want)


def test_truncated_vectors(file: Path, texts: list[str]) -> None:
    module = RBETransformer(file)
    module.encoder.truncate_dim = 10
    want = rbe.load(file).embed(texts)[:, :10]
    np.testing.assert_array_equal(StandIn(modules=[module]).encode(texts), want)
    assert module.get_embedding_dimension() == 10


def test_saved_folders(library: Any, file: Path, texts: list[str], tmp_path: Path) -> None:
    model = library(modules=[RBETransformer(file, max_seq_length=20)], device="cpu")
    want = model.encode(texts)
    for name in ("one", "one", "two"):  # onto itself, too
        model.save(str(tmp_path / name))
        model = library(str(tmp_path / name), device="cpu", trust_remote_code=True)
        assert model[0].max_seq_length == 20
        np.testing.assert_array_equal(model.encode(texts), want)
    saved = tmp_path / "one" / "0_RBETransformer"
    assert (saved / "model.rbe.safetensors").read_bytes() == file.read_bytes()
    for bad in ({"dtype": 3}, {"path": "elsewhere"}, {"cache_bytes": True}):
        (saved / "rbe_settings.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="is not a setting of RBETransformer"):
            RBETransformer.load(str(tmp_path / "one"), subfolder="0_RBETransformer")


def test_a_file_that_changed_is_not_saved(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.rbe.safetensors"
    path.write_bytes(file.read_bytes())
    module = RBETransformer(path)
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    other.replace(path)
    with pytest.raises(ValueError, match="has been changed since it was loaded"):
        module.save(str(tmp_path))


def test_copies(file: Path, texts: list[str]) -> None:
    module = RBETransformer(file)
    want = StandIn(modules=[module]).encode(texts[:3])
    twin = copy.deepcopy(module).half()  # the dtype of the states is that of the encoder
    np.testing.assert_array_equal(StandIn(modules=[twin]).encode(texts[:3]), want)


def test_what_is_no_encoder_file(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rbe-gpu compress"):
        RBETransformer(tmp_path)
    tensors, config = rbe.load_file(file)
    del tensors["tokenizer.json.zst"]
    rbe.save_file(tmp_path / "bare", tensors, config)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        RBETransformer(tmp_path / "bare")
    with pytest.raises(TypeError, match=r"texts\[0\] is a tuple"):
        RBETransformer(file).preprocess([("a", "b")])


def test_other_padding_is_refused(file: Path) -> None:
    module = RBETransformer(file)
    features = module.preprocess(["one", "two words of a longer text"])
    with pytest.raises(ValueError, match="not that of padding on the right"):
        module({name: value.flip(1) for name, value in features.items()})
