"""The forward pass of decoders in PyTorch and the divergence of their predictions, against this package's decoders
and PyTorch's own gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.codecs import GridCodes
from rbe_gpu.container import Writer, load_file
from rbe_gpu.models.decoder_tensors import EMBEDDINGS, HEAD, POSITIONS, canonical_name
from rbe_gpu.models.load import load_decoder, load_embedder

torch = pytest.importorskip(
    "torch", reason="training needs PyTorch, which `make test` installs with the baselines"
)

from torch.nn import functional  # noqa: E402

from rbe_gpu.train import prediction  # noqa: E402
from rbe_gpu.train.batches import padded  # noqa: E402
from rbe_gpu.train.objective import relative_error  # noqa: E402
from rbe_gpu.train.prediction_task import PredictionTask  # noqa: E402
from rbe_gpu.train.quantizer import Grid  # noqa: E402
from rbe_gpu.train.task import Pass  # noqa: E402
from rbe_gpu.train.vectors_task import VectorsTask  # noqa: E402

from .architectures import test_embedders  # noqa: E402
from .architectures.decoder_cases import CONFIGS, LENGTHS, inputs  # noqa: E402
from .architectures.embedder_cases import CASES, TEXTS  # noqa: E402
from .architectures.test_decoders import RECORDED, model, named  # noqa: E402

#: of the largest value: float32 sums in another order, three layers; the recorded states are as close
TOLERANCE = 1e-4
TEXT = torch.arange(int(LENGTHS.max())) < torch.from_numpy(LENGTHS)[:, None]


def in_grid_codes(weight: NDArray[np.float32], table: bool) -> Any:
    """A weight rounded to integers of some 3 bits, with scales of rows and columns; a matrix is transformed, too."""
    rows, cols = weight.shape
    block, transform = 32, "none" if table else "dct"
    rows_pad, cols_pad = rows if table else -(-rows // block) * block, -(-cols // block) * block
    random = np.random.RandomState(3)
    row_scale, col_scale = random.uniform(0.5, 2, rows_pad), random.uniform(0.1, 0.2, cols_pad)
    padding = np.zeros((rows_pad, cols_pad), np.float32)
    padding[:rows, :cols] = weight
    codes = GridCodes.from_integers(
        np.rint(padding / row_scale[:, None] / col_scale).astype(np.int8), row_scale, col_scale, 0.0
    )
    make = rbe.RBEVectors if table else rbe.RBEMatrix
    return make((rows, cols), block, transform, 1.0, None, codes)


def weights_of(tensors: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(values, np.float32)) for name, values in tensors.items()}


def logits_of(task: PredictionTask, weights: dict[str, Any]) -> NDArray[np.float32]:
    """(tokens, vocab_size)"""
    states = task.student.states(weights, weights[EMBEDDINGS][torch.from_numpy(inputs())], TEXT)
    head = weights[EMBEDDINGS if task.model.settings.tied else HEAD]
    logits = task.outputs(states[-1], TEXT, weights) @ head.T
    cap = task.model.settings.logit_softcap
    return np.asarray(logits if cap is None else cap * torch.tanh(logits / cap))


def error(got: NDArray[Any], want: NDArray[Any]) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_decoder(name: str, tmp_path: Path) -> None:
    """Of the dense weights, as recorded from transformers and as the decoder's; of a file whose tables and first
    layer are in grid codes, as the decoder's that is loaded from it.
    """
    dense = model(name)
    teacher = logits_of(PredictionTask(dense), weights_of(dense.tensors()))
    assert error(teacher, RECORDED[f"{name}.logits"]) <= TOLERANCE
    there = np.asarray(TEXT)
    assert error(teacher, np.asarray(dense.logits(inputs(), LENGTHS))[there]) <= TOLERANCE
    out = tmp_path / "m.rbe.safetensors"
    with Writer(out) as writer:
        writer.config = {"model_type": CONFIGS[name]["model_type"], "config": CONFIGS[name]}
        for key, values in named(name).items():
            short = canonical_name(key)
            coded = values.ndim == 2 and not short.startswith(("model.layers.1", "model.layers.2"))
            writer.add(key, in_grid_codes(values, short in (EMBEDDINGS, POSITIONS)) if coded else values)
    lossy = load_decoder(out)
    stored = {canonical_name(key): value for key, value in load_file(out)[0].items()}
    weights = {}
    for key, value in dense.tensors().items():
        kept = stored[key]
        grid = (
            Grid(kept, np.asarray(value), "cpu") if isinstance(kept, rbe.RBEMatrix | rbe.RBEVectors) else None
        )
        weights[key] = torch.from_numpy(np.array(kept)) if grid is None else grid.weight().detach()
    student = logits_of(PredictionTask(dense), weights)
    assert error(student, np.asarray(lossy.logits(inputs(), LENGTHS))[there]) <= TOLERANCE
    assert error(student, teacher) > 100 * TOLERANCE  # the weights are others


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_those_of_the_embedder(name: str, tmp_path: Path) -> None:
    embedder = load_embedder(test_embedders.folder(name, tmp_path / "m"))
    task = VectorsTask(embedder)
    weights = weights_of(embedder.tensors())
    batch = padded(embedder.token_ids(TEXTS, embedder.resolve_prompt()), "cpu")
    some = batch.text.sum(1) > 0
    states = task.student.states(weights, weights[task.words][batch.ids], batch.text)
    vectors = np.asarray(task.outputs(states[-1], batch.text, weights))
    assert error(vectors[some], embedder.embed(TEXTS, normalize=True)[some]) <= TOLERANCE


# --- the divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("logits", [7, 61 * 4, 1 << 24])
def test_the_divergence_and_its_gradients(
    softcap: float | None, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of one, four and all tokens, against float64 and PyTorch's gradients."""
    monkeypatch.setattr(prediction, "_LOGITS", logits)
    random = torch.Generator().manual_seed(1)
    x, w, y, v = (torch.randn(rows, 8, generator=random) for rows in (11, 61, 11, 61))
    exact = [a.double().requires_grad_() for a in (x, w)]

    def logs(states: Any, head: Any) -> Any:
        scores = states @ head.T
        return torch.log_softmax(scores if softcap is None else softcap * torch.tanh(scores / softcap), -1)

    q, p = logs(*exact), logs(y.double(), v.double())
    want = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    (3 * want).backward()
    leaves = [a.clone().requires_grad_() for a in (x, w)]
    kl, same = prediction.divergence_loss(*leaves, y, v, softcap)
    (3 * kl).backward()
    assert kl.item() == pytest.approx(want.item(), rel=1e-5)
    assert float(same) == pytest.approx(float((q.argmax(1) == p.argmax(1)).double().mean()))
    for got, leaf in zip(leaves, exact, strict=True):
        torch.testing.assert_close(got.grad, leaf.grad.float(), rtol=1e-4, atol=1e-6)
    sums = prediction.divergence(x, w, y, v, softcap)
    assert float(sums.kl) == pytest.approx(11 * want.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "mistral"])
def test_gradients_reach_every_weight(name: str) -> None:
    """Those of the loss, as PyTorch's from the logits of all tokens: of a tied table they are of both its uses."""
    dense = model(name)
    task = PredictionTask(dense)
    ids = torch.from_numpy(inputs())
    taught = weights_of(dense.tensors())
    noise = torch.Generator().manual_seed(2)
    start = {key: a + 0.05 * torch.randn(a.shape, generator=noise) for key, a in taught.items()}

    def passed(weights: dict[str, Any]) -> Pass:
        states = task.student.states(weights, functional.embedding(ids, weights[EMBEDDINGS]), TEXT)
        return Pass(weights, states, task.outputs(states[-1], TEXT, weights))

    teacher, gradients = passed(taught), []
    head = EMBEDDINGS if dense.settings.tied else HEAD
    cap = dense.settings.logit_softcap
    for fused in (True, False):
        weights = {key: a.clone().requires_grad_() for key, a in start.items()}
        student = passed(weights)
        if fused:
            loss, _ = task.loss(student, teacher, TEXT)
        else:
            z, t = (one.outputs @ one.weights[head].T for one in (student, teacher))
            if cap is not None:
                z, t = (cap * torch.tanh(a / cap) for a in (z, t))
            logs = (torch.log_softmax(a, -1) for a in (z, t))
            kl = functional.kl_div(*logs, log_target=True, reduction="batchmean")
            loss = kl + relative_error(student.states, teacher.states, TEXT)
        loss.backward()
        gradients.append({key: a.grad for key, a in weights.items()})
    assert task.reads_rows is not dense.settings.tied
    largest = max(float(want.abs().max()) for want in gradients[1].values())
    for key, want in gradients[1].items():
        if not key.endswith("k_proj.bias"):  # it adds the same to all scores of a query: the gradient is 0
            assert want.abs().max() > 1e-4 * largest, key
        torch.testing.assert_close(gradients[0][key], want, rtol=1e-3, atol=1e-6 * largest)


def test_every_token_counts_alike_in_the_error_of_states() -> None:
    text = torch.tensor([[True, True, False]])
    y = torch.tensor([[[1000.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    x = y + torch.tensor([[[500.0, 0.0], [0.5, 0.0], [9.0, 0.0]]])
    norms = 1000.0**2, 1e-3 * (1000.0**2 + 1) / 2  # the second counts as a thousandth of the mean
    want = np.mean([500.0**2 / norms[0], 0.5**2 / norms[1]])
    assert float(relative_error([x], [y], text)) == pytest.approx(want)
    assert float(relative_error([x, y], [y, y], text)) == pytest.approx(want / 2)
