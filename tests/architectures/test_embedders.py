"""Vectors of small models are those of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rbe_gpu.cpu_fallback import bit_planes, grid_planes, isa
from safetensors.numpy import load_file, save_file

import rbe_gpu as rbe
from rbe_gpu.codecs.grid import GridCodes, GridPlanes
from rbe_gpu.models import corpus
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.decoder_embedder import DecoderEmbedder
from rbe_gpu.models.decoder_tensors import LINEAR_PARTS, linear_weights
from rbe_gpu.models.decoders import DECODERS
from rbe_gpu.models.load import load, load_embedder
from rbe_gpu.train.distill import distill

from .. import real
from .embedder_cases import CASES, TANH, TEXTS, write

RECORDED = np.load(Path(__file__).with_name("embedder_vectors.npz"))
#: of the largest component: float32 sums in another order
TOLERANCE = 1e-5
GEMMA, MODERNBERT, NOMIC = "embeddinggemma", "modernbert", "nomic_bert"
BERT = "bert, Dense with tanh"


def folder(name: str, path: Path) -> Path:
    shapes = json.loads(str(RECORDED[f"{name}.shapes"]))
    return write(path, CASES[name], {key: tuple(shape) for key, shape in shapes.items()})


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_case_is_recorded() -> None:
    assert {key.rpartition(".")[0] for key in RECORDED.files} == set(CASES)
    encoders = {name for name, family in DECODERS.items() if family.encoder}
    assert encoders <= {case.config["model_type"] for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_vectors(name: str, tmp_path: Path) -> None:
    model, want = load_embedder(folder(name, tmp_path / "m")), RECORDED[f"{name}.vectors"]
    vectors = model.embed(TEXTS, **CASES[name].call)
    assert vectors.shape == want.shape == (len(TEXTS), model.embedding_size)
    assert np.abs(vectors - want).max() <= TOLERANCE * np.abs(want).max()
    alone = np.concatenate([model.embed([text], **CASES[name].call) for text in TEXTS])
    # one token takes another matmul algorithm than many
    assert np.abs(vectors - alone).max() <= TOLERANCE * np.abs(want).max()
    moved = rbe.to(model, "cpu").embed(TEXTS, **CASES[name].call)
    np.testing.assert_array_equal(moved, vectors)


@pytest.mark.parametrize("name", CASES)
def test_hidden_states(name: str, tmp_path: Path) -> None:
    """After the embeddings and every layer."""
    model, want = load_embedder(folder(name, tmp_path / "m")), RECORDED[f"{name}.states"]
    ids = model.token_ids(TEXTS)
    lengths = np.array([len(text) for text in ids])
    padded = np.zeros((len(ids), lengths.max()), np.int64)
    for row, text in zip(padded, ids, strict=True):
        row[: len(text)] = text
    if isinstance(model, DecoderEmbedder):
        states = model.decoder.hidden_states(padded, lengths)
    else:
        states = model.forward(padded, lengths, all_hidden_states=True)
    for got, expected in zip(states, want, strict=True):
        packed = np.concatenate([got[i, :n] for i, n in enumerate(lengths)])
        assert np.abs(packed - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_compressed_files(name: str, tmp_path: Path) -> None:
    """Those of 12-bit codes are close, and keep Dense modules and settings."""
    source, out = folder(name, tmp_path / "m"), tmp_path / "m.rbe.safetensors"
    compress_model(source, out, codes="dense-int12", transform="none")
    dense, model = load_embedder(source), load_embedder(out)
    a, b = (m.embed(TEXTS, normalize=True, **CASES[name].call) for m in (dense, model))
    assert (a * b).sum(axis=1).min() > 0.9999
    assert model.tensors().keys() == dense.tensors().keys()
    assert model.normalize == CASES[name].normalize
    assert [m.activation for m in model.dense] == [m.activation for m in dense.dense]
    again = dense.with_tensors(model.tensors())
    np.testing.assert_array_equal(again.embed(TEXTS), model.embed(TEXTS))
    if not model.dense:
        return
    shifted = dense.with_tensors({"dense.0.weight": 2 * dense.tensors()["dense.0.weight"]})
    assert np.abs(shifted.embed(TEXTS, normalize=False) - dense.embed(TEXTS, normalize=False)).max() > 0.01


def test_half_types(tmp_path: Path) -> None:
    source = folder(GEMMA, tmp_path / "m")
    vectors, whole = (load_embedder(source, dtype=d).embed(TEXTS) for d in ("bfloat16", "float32"))
    assert vectors.dtype == np.float32
    assert (vectors * whole).sum(axis=1).min() > 0.99
    weights = load_file(source / "2_Dense" / "model.safetensors")
    save_file({k: v.astype(np.float16) for k, v in weights.items()}, source / "2_Dense" / "model.safetensors")
    half = load_embedder(source).embed(TEXTS)
    np.testing.assert_allclose(half, whole, atol=2e-3)


def test_the_width_counts_pooled_columns(tmp_path: Path) -> None:
    model = load_embedder(folder(BERT, tmp_path / "m"))
    assert (model.pooled_size, model.embedding_size) == (48, 48)
    states = model.forward(np.full((2, 5), 3))
    assert model.pool(states).shape == (2, 48)
    out = np.empty((2, 48), np.float16)
    np.testing.assert_allclose(model.pool(states, out=out), model.pool(states), atol=1e-3)


def test_both_directions(tmp_path: Path) -> None:
    """What is behind a token changes it, within half of the window to either side."""
    model = load(folder(GEMMA, tmp_path / "m"))
    assert isinstance(model, DecoderEmbedder)
    c = model.decoder.settings
    assert (c.causal, c.windows) == (False, (5, 5, None, 5))
    with pytest.raises(ValueError, match="attention in both directions: it generates no text"):
        model.decoder.generate(["x"], 4)


def test_a_model_without_modules_is_refused(tmp_path: Path) -> None:
    path = folder(GEMMA, tmp_path / "m")
    (path / "modules.json").unlink()
    for call in (lambda: load(path), lambda: compress_model(path, tmp_path / "c", codes="dense-int8")):
        with pytest.raises(ValueError, match=r"use_bidirectional_attention.*needs modules.json"):
            call()


def test_modernbert(tmp_path: Path) -> None:
    """An encoder without modules.json makes the mean; checkpoints with a head have a prefix."""
    path = folder(MODERNBERT, tmp_path / "m")
    model = load(path)
    assert isinstance(model, DecoderEmbedder)
    c = model.decoder.settings
    assert (c.causal, c.windows) == (False, (None, 5, 5, None, 5))
    assert model.decoder.layers[0].norms[0] is None
    with pytest.raises(ValueError, match="attention in both directions: it generates no text"):
        model.decoder.logits(np.full((1, 3), 5))
    names = set(model.tensors())
    assert "model.layers.0.input_layernorm.weight" not in names
    assert "model.layers.1.input_layernorm.weight" in names
    (path / "modules.json").unlink()
    tensors = load_file(path / "model.safetensors")
    head = {"head.norm.weight": np.ones(64, np.float32), "decoder.bias": np.zeros(270, np.float32)}
    save_file({**{f"model.{k}": v for k, v in tensors.items()}, **head}, path / "model.safetensors")
    plain = load_embedder(path)
    assert (plain.pooling, plain.normalize) == (("mean",), False)
    states = plain.forward(plain.token_ids(TEXTS[:1])[0][None].astype(np.int64))
    np.testing.assert_allclose(plain.embed(TEXTS[:1])[0], states[0].mean(axis=0), atol=1e-5)


def test_int8_activations_of_modernbert(tmp_path: Path) -> None:
    source, out = folder(MODERNBERT, tmp_path / "m"), tmp_path / "m.rbe.safetensors"
    compress_model(source, out, codes="dense-int8", transform="none")
    rounded, whole = load_embedder(out, activations="int8"), load_embedder(out)
    names = {f"model.layers.{i}.{name}.weight" for i in range(5) for name in LINEAR_PARTS.values()}
    assert (rounded.int8_activations, whole.int8_activations) == (names, frozenset())
    dense = load_embedder(source).embed(TEXTS)
    assert (whole.embed(TEXTS) * dense).sum(axis=1).min() > 0.999
    assert 0.97 < (rounded.embed(TEXTS) * dense).sum(axis=1).min() < 0.9999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local_attention": None}, "local_attention=null; needs a positive integer"),
        ({"local_attention": 0}, "local_attention=0; needs a positive integer"),
        ({"norm_eps": 2}, "norm_eps=2; needs a number from 0 to 1"),
        ({"norm_bias": 1}, "norm_bias=1; needs true or false"),
        ({"hidden_activation": "snake"}, 'hidden_activation="snake"'),
        ({"head_dim": 4}, "head_dim=4: heads are"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rotary embedding "dynamic"'),
        ({"rope_parameters": {"rope_theta": 1.0}}, "an object for each type of layers"),
        ({"global_rope_theta": 0}, "rope_theta of the rotary embedding=0"),
        ({"norm_bias": True}, "no tensor 'model.norm.bias'"),
        ({"attention_bias": True}, r"no tensor 'model.layers.0.self_attn.q_proj.bias'"),
        (
            {"intermediate_size": 95},
            r'"layers.0.mlp.Wi.weight" has shape \(192, 64\), but config.json says 190 rows',
        ),
        ({"num_hidden_layers": 6}, r"no tensor 'model.layers.5.self_attn.q_proj.weight'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; needs at most 10000"),
        ({"rope_theta": 5.0}, "rope_theta=5.0"),
        ({"new_key": 1}, 'unknown key "new_key"'),
    ],
)
def test_what_is_not_supported_of_modernbert_is_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = folder(MODERNBERT, tmp_path / "m")
    change(path / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(ValueError, match=message):
        compress_model(path, tmp_path / "c", codes="dense-int8")


def own_nomic(path: Path) -> Path:
    """The folder of a NomicBERT with the names of the model's own code, as nomic-embed-text has them."""
    path = folder(NOMIC, path)
    stored = load_file(path / "model.safetensors")
    made = {}
    for name, tensor in stored.items():
        name = name.replace("embeddings.LayerNorm", "emb_ln").replace("layers.", "encoder.layers.")
        for other, own in (
            ("self_attn.o_proj", "attn.out_proj"), ("mlp.up_proj", "mlp.fc11"), ("mlp.gate_proj", "mlp.fc12"),
            ("mlp.down_proj", "mlp.fc2"), ("post_attention_layernorm", "norm1"), ("post_mlp_layernorm", "norm2"),
        ):  # fmt: skip
            name = name.replace(other, own)
        made[name] = tensor
    for i in range(3):
        at = f"encoder.layers.{i}."
        rows = [made.pop(f"{at}self_attn.{part}_proj.weight") for part in "qkv"]
        made[f"{at}attn.Wqkv.weight"] = np.concatenate(rows)
    save_file(made, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    own = {
        "model_type": "nomic_bert", "vocab_size": config["vocab_size"], "type_vocab_size": 2, "n_embd": 64,
        "n_inner": 96, "n_layer": 3, "n_head": 4, "n_positions": 200, "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-12, "rotary_emb_base": 700, "rotary_emb_fraction": 1.0, "prenorm": False,
        "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
        "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "use_rms_norm": False,
        "auto_map": {"AutoModel": "x"}, "max_trained_positions": 200, "causal": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(own))
    return path


def test_nomic_bert_with_its_own_names(tmp_path: Path) -> None:
    """The model's own code names tensors and settings otherwise than transformers."""
    model, same = load_embedder(own_nomic(tmp_path / "own")), load_embedder(folder(NOMIC, tmp_path / "m"))
    assert isinstance(model, DecoderEmbedder)
    np.testing.assert_array_equal(model.embed(TEXTS), same.embed(TEXTS))
    assert model.tensors().keys() == same.tensors().keys()
    assert "model.norm.weight" not in model.tensors()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": 0}, "n_layer=0; needs a positive integer"),
        ({"n_inner": 64}, r'fc1[12].weight" has shape \(96, 64\), but config.json says 64 rows'),
        ({"hidden_size": 32}, "hidden_size=32; needs n_embd=64, or absent"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"; needs silu, beside activation_function'),
        ({"rotary_emb_base": None}, "rotary_emb_base=null; needs a positive number"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias=true: linear layers have no biases"),
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction=0.5: whole heads"),
        ({"rotary_scaling_factor": 2}, "rotary_scaling_factor=2: scaled rotations"),
        ({"prenorm": True}, "prenorm=true: only norms behind each part"),
        ({"activation_function": "geglu"}, "activation_function 'geglu'"),
        ({"moe_every_n_layers": 2}, "moe_every_n_layers=2: mixtures of experts"),
        ({"layer_norm_epsilon": 3}, "layer_norm_epsilon=3; needs a number from 0 to 1"),
        ({"type_vocab_size": 0}, "type_vocab_size=0; needs a positive integer"),
        ({"type_vocab_size": 3}, r"token_type_embeddings.weight has shape \(2, 64\)"),
        ({"n_experts": 3}, 'unknown key "n_experts"'),
    ],
)
def test_what_is_not_supported_of_nomic_bert_is_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = own_nomic(tmp_path / "m")
    change(path / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_settings_of_nomic_bert_that_have_another_default_have_to_be_there(tmp_path: Path) -> None:
    path = own_nomic(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    del config["qkv_proj_bias"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json has no qkv_proj_bias, for which"):
        load(path)


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = folder(MODERNBERT, tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    twice = {**tensors, "model.final_norm.weight": tensors["final_norm.weight"]}
    save_file(twice, path / "model.safetensors")
    with pytest.raises(ValueError, match=r'final_norm.weight" are the same weight'):
        load(path)


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")  # bytes are few different tokens
@pytest.mark.parametrize("name", [MODERNBERT, "nomic_bert", "embeddinggemma"])
def test_calibration(name: str, tmp_path: Path) -> None:
    """At six bits vectors are close to those of the dense model; at four they are closer than rounded ones."""
    model = load_embedder(folder(name, tmp_path / "m"))
    texts = [text[:60] for text in real.texts()[:40]]
    calibrated = rbe.calibrate(model, texts, block=32)
    names = {name for name, tensor in model.decoder.tensors().items() if tensor.ndim == 2 and len(tensor) > 2}
    assert calibrated.sensitivity.keys() == names
    assert all(value > 0 for value in calibrated.sensitivity.values())
    size = sum(w.values.size for w in calibrated._weights.values())
    for bits, least in ((6, 0.995), (4, 0.96)):
        made = calibrated.compress(size * bits / 8).tensors
        assert 1 - calibrated.loss(made, texts) > least


@pytest.mark.parametrize("name", [MODERNBERT, NOMIC])
def test_int8_layers_are_bit_planes_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the encoders that share a decoder's code: the vectors have the bits of packed codes."""
    dense = load_embedder(folder(name, tmp_path / "m"))
    names, tensors = list(linear_weights(dense.config)), dense.tensors()
    for weight in names:
        values = np.pad(tensors[weight], [(0, -size % 32) for size in tensors[weight].shape])
        step = 2 * values.std()
        q = np.rint(values / step).astype(np.int8)
        codes = GridCodes.from_integers(q, np.full(len(q), step), np.ones(q.shape[1]))
        tensors[weight] = rbe.RBEMatrix(tensors[weight].shape, 32, "none", 1.0, None, codes)
    monkeypatch.setattr(grid_planes, "_WORTH", 9)  # whatever it saves
    model = dense.with_tensors(tensors).with_int8_activations(names)
    vectors = model.embed(TEXTS)
    forms = {type(t.codes) for key, t in model.tensors().items() if key in names}
    assert forms == {GridPlanes if bit_planes.moves_bits(isa.active(), isa.host()) else GridCodes}
    monkeypatch.setattr(GridCodes, "for_int8", lambda self: self)
    packed = dense.with_tensors(tensors).with_int8_activations(names)
    np.testing.assert_array_equal(packed.embed(TEXTS), vectors)


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")
def test_a_calibrated_file(tmp_path: Path) -> None:
    """On other texts it loses a ninth of what a file of the same size loses that was not calibrated."""
    path, texts = folder(MODERNBERT, tmp_path / "m"), [text[:60] for text in real.texts()[:80]]
    others = [text[:60] for text in real.texts()[300:400]]
    dense, losses = load_embedder(path).embed(others, normalize=True), []
    for calibrate in (None, texts):
        summary = compress_model(path, tmp_path / "c", ratio=4, calibrate=calibrate, block=32)
        assert summary.ratio >= 4
        vectors = load_embedder(tmp_path / "c").embed(others, normalize=True)
        losses.append(1 - float((vectors * dense).sum(1).mean()))
    assert losses[1] < losses[0] / 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "activation_function=.*needs one of"),
        ({"activation_function": None}, "activation_function=null"),
        ({"in_features": 65}, "in_features=65, but the vectors before it have 64 columns"),
        ({"out_features": 0}, "out_features=0; needs a positive integer"),
        ({"out_features": 15}, r"dense.0.weight has shape \(48, 64\), its settings say \(15, 64\)"),
        ({"bias": "yes"}, 'bias="yes"'),
        ({"use_residual": True}, "use_residual=true: residual connections"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ({"gain": 2}, 'unknown key "gain"'),
    ],
)
def test_dense_settings_that_are_not_supported_are_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = folder(BERT, tmp_path / "m")
    change(path / "2_Dense" / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(ValueError, match=message):
        compress_model(path, tmp_path / "c", codes="dense-int8")


def test_dense_tensors_that_are_not_supported_are_named(tmp_path: Path) -> None:
    path = folder(BERT, tmp_path / "m")
    file = path / "2_Dense" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "residual.weight": weights["linear.weight"]}, file)
    with pytest.raises(ValueError, match=r"2_Dense.*has the tensor 'residual.weight'"):
        load(path)
    save_file(weights, file)
    change(path / "2_Dense" / "config.json", bias=False)
    with pytest.raises(ValueError, match=r"2_Dense.*has the tensor 'linear.bias', which"):
        load(path)
    change(path / "2_Dense" / "config.json", bias=True)
    save_file({"linear.weight": weights["linear.weight"]}, file)
    with pytest.raises(ValueError, match=r"no tensor 'dense.0.bias' of its Dense module"):
        load(path)
    checkpoint = load_file(path / "model.safetensors")
    save_file({**checkpoint, "dense.0.weight": weights["linear.weight"]}, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has a tensor 'dense.0.weight', which is the name of a Dense module's"
    ):
        load(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"2_Dense has no model.safetensors"):
        load(path)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("Transformer", "Dense", "Pooling"), "Transformer, Dense, Pooling; needs"),
        (("Transformer", "Pooling", "Normalize", "Dense"), "Pooling, Normalize, Dense; needs"),
        (("Transformer", "Pooling", "LayerNorm"), 'the module "LayerNorm"'),
    ],
)
def test_modules_in_another_order_are_refused(kinds: tuple[str, ...], message: str, tmp_path: Path) -> None:
    path = folder(BERT, tmp_path / "m")
    places = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": places.get(kind, ""),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_two_modules_of_one_folder_are_refused(tmp_path: Path) -> None:
    path = folder(BERT, tmp_path / "m")
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps([*modules, {**modules[-1], "idx": 3, "name": "3"}]))
    with pytest.raises(ValueError, match='two Dense modules in "2_Dense"'):
        load(path)


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")  # bytes are few different tokens
def test_calibration_takes_dense_modules(tmp_path: Path) -> None:
    path, texts = folder(BERT, tmp_path / "m"), list(real.texts()[:60])
    model = load_embedder(path)
    calibrated = rbe.calibrate(model, texts)
    budget = sum(w.values.size for w in calibrated._weights.values()) * 6 / 8
    compressed = model.with_tensors(calibrated.compress(budget).tensors)
    a, b = (m.embed(texts, normalize=True) for m in (model, compressed))
    assert (a * b).sum(axis=1).mean() > 0.99


@pytest.mark.parametrize("name", sorted(name for name in CASES if CASES[name].prompts))
def test_training_reads_a_token_behind_a_prompt_that_is_not_pooled(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="training needs PyTorch")
    from rbe_gpu.train.batches import padded
    from rbe_gpu.train.vectors_task import VectorsTask

    model = load_embedder(folder(name, tmp_path / "m"))
    model.include_prompt, model.default_prompt_name = False, next(iter(model.prompts))
    prompt = model.resolve_prompt()
    task = VectorsTask(model)
    empty = len(model.token_ids([""], prompt)[0])
    with pytest.raises(ValueError, match=f"max_tokens={empty} leaves no room .* use {empty + 1} or more"):
        task.check_options(2, empty)
    task.check_options(2, empty + 1)
    text = "a text of several words"
    whole = model.token_ids([text], prompt)[0]
    sequences = task.sequences([text, ""], empty + 1)  # the empty one has no token to pool
    assert [len(ids) for ids in sequences] == [empty + 1]
    special = bool(model.tokenizer.encode("a").special_tokens_mask[-1])
    np.testing.assert_array_equal(sequences[0][:-1], whole[:empty])
    assert sequences[0][-1] == (whole[-1] if special else whole[empty])
    weights = {n: torch.from_numpy(np.array(w, np.float32)) for n, w in model.tensors().items()}
    batch = padded(sequences, "cpu")
    states = torch.randn(*batch.ids.shape, model.hidden_size, generator=torch.Generator().manual_seed(1))
    norms = task.outputs(states, batch.text, weights).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(1))


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")
def test_training_holds_dense_modules_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And brings vectors closer to those of the dense model."""
    monkeypatch.setattr(
        corpus, "held_out", lambda count: []
    )  # the start file is calibrated, however few the texts
    path = folder("embeddinggemma", tmp_path / "m")
    texts = [text[:60] for text in real.texts()[:320]]
    compress_model(path, tmp_path / "start", ratio=4, calibrate=texts[:40], block=32)
    options = {"start": tmp_path / "start", "batch_size": 16, "max_tokens": 40}
    summary = distill(path, texts, out=tmp_path / "c", ratio=4, steps=50, **options)
    assert summary.ratio >= 4
    assert summary.result.cosine_mean > summary.start.cosine_mean
    start, trained = (rbe.load_file(tmp_path / name)[0] for name in ("start", "c"))
    names = [name for name in start if name.startswith("dense.")]
    assert len(names) == 2
    for name in names:
        np.testing.assert_array_equal(trained[name].decode(), start[name].decode())


def test_a_stored_list_that_is_none_is_refused(tmp_path: Path) -> None:
    from rbe_gpu.container import load_file as load_rbe
    from rbe_gpu.container import save_file as save_rbe

    compress_model(folder(BERT, tmp_path / "m"), tmp_path / "c", codes="dense-int8")
    tensors, config = load_rbe(tmp_path / "c")
    assert config["dense"][0]["activation_function"] == TANH
    save_rbe(tmp_path / "c", tensors, {**config, "dense": {"0": 1}})
    with pytest.raises(ValueError, match="has dense, which is not a list of settings"):
        load(tmp_path / "c")
    save_rbe(tmp_path / "c", tensors, {**config, "dense": [3]})
    with pytest.raises(ValueError, match=r"dense\[0\] is a int, expected an object"):
        load(tmp_path / "c")
