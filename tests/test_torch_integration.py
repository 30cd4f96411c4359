"""Compressed Linear layers inside PyTorch models: results, what is replaced, calibration, states and errors."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import dispatch
from rbe_gpu.container import to_bytes
from rbe_gpu.registry import OPS, relative_error

from . import real
from .host import stand_in

torch = pytest.importorskip(
    "torch", reason="the integration needs PyTorch, which `make test` installs with the baselines"
)

from rbe_gpu.integrations import linear_module, tensors  # noqa: E402
from rbe_gpu.integrations.torch import RBELinearModule, load_state_dict, replace_linear  # noqa: E402

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "float16", "bfloat16")


def linear(index: int, name: str, bias: bool = True) -> Any:
    """A Linear of MiniLM."""
    weight = torch.from_numpy(real.layer(index, f"{name}.weight").copy())
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias:
            made.bias.copy_(torch.from_numpy(real.layer(index, f"{name}.bias").copy()))
    return made


class FFN(torch.nn.Module):
    """The feed-forward network of one layer of MiniLM."""

    def __init__(self, index: int = 3) -> None:
        super().__init__()
        self.up, self.down = linear(index, "intermediate.dense"), linear(index, "output.dense")

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return self.down(torch.nn.functional.gelu(self.up(x))) * scale


@cache
def states() -> np.ndarray:
    """Real inputs of that network, (rows, 384) float32, padding left out."""
    ids, lengths = real.batch(48)
    model = rbe.load(real.MODEL_DIR)
    every = model.forward(ids, lengths, all_hidden_states=True)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    attention, norm, *_ = model.layers[3]
    x = every[3][text]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    return norm(attention(x, residual=x, cu_seqlens=cu_seqlens))


def activations(rows: int = 40) -> Any:
    return torch.from_numpy(states()[:rows].copy())


@pytest.fixture(scope="module")
def layer() -> Any:
    return RBELinearModule.from_linear(linear(3, "intermediate.dense"), codes="dense-int4")


def expected(module: Any, x: Any) -> np.ndarray:
    y = x.double().numpy() @ module.compressed.decode().astype(np.float64).T
    return y if module.bias is None else y + module.bias.double().numpy()


def check(module: Any, x: Any) -> None:
    y = module(x)
    assert y.dtype is x.dtype
    assert y.shape == (*x.shape[:-1], module.out_features)
    tol = OPS["linear"].tolerances[str(y.dtype).removeprefix("torch.")]
    assert relative_error(tensors.as_array(y), expected(module, x), tol.floor) <= tol.rel


# --- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", ["dense-int4", "sparse-int8"])
def test_the_result_is_that_of_the_decoded_weight(dtype: str, codes: str) -> None:
    density = 0.2 if codes.startswith("sparse") else None
    dense = linear(3, "intermediate.dense")
    module = RBELinearModule.from_linear(dense, codes=codes, density=density).to(getattr(torch, dtype))
    x = activations().to(getattr(torch, dtype))
    assert module.bias.dtype is x.dtype
    check(module, x)
    check(module.float(), x)  # the bias may have another dtype than the input


@pytest.mark.parametrize("shape", [(384,), (1, 384), (7, 384), (2, 3, 384), (1, 2, 2, 2, 384)])
def test_leading_axes(layer: Any, shape: tuple[int, ...]) -> None:
    check(layer, activations(8).reshape(-1)[: int(np.prod(shape))].reshape(shape))


@pytest.mark.parametrize("shape", [(0, 384), (2, 0, 384), (0, 0, 384)])
def test_empty_batches(layer: Any, shape: tuple[int, ...]) -> None:
    assert layer(torch.empty(shape)).shape == (*shape[:-1], 1536)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.reshape(4, 10, 384).transpose(0, 1),
        lambda x: x[::3],
        lambda x: x[:1].expand(5, 384),
        lambda x: torch.cat([x, x], dim=1)[:, 100:484],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(layer: Any, strided: Any, dtype: str) -> None:
    x = strided(activations().to(getattr(torch, dtype)))
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_without_bias() -> None:
    module = RBELinearModule.from_linear(linear(3, "intermediate.dense", bias=False), grade="A")
    assert module.bias is None
    check(module, activations())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_and_arrays_share_memory(dtype: str) -> None:
    tensor = torch.zeros(3, 5, dtype=getattr(torch, dtype))
    array = tensors.as_array(tensor)
    assert array.dtype.name == dtype
    assert array.ctypes.data == tensor.data_ptr()
    back = tensors.as_tensor(array)
    assert (back.data_ptr(), back.dtype) == (tensor.data_ptr(), tensor.dtype)


def test_int8_activations() -> None:
    dense = linear(3, "intermediate.dense")
    module = RBELinearModule.from_linear(dense, codes="dense-int4", activation_bits=8)
    x = activations()
    want = rbe.linear(x.numpy(), module.compressed, module.bias.numpy(), activation_bits=8)
    np.testing.assert_array_equal(module(x).numpy(), want)
    assert "int8 activations" in repr(module)


def test_threads_share_one_module(layer: Any) -> None:
    inputs = [activations(rows) for rows in (1, 5, 16, 40)]
    want = [layer(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(layer(inputs[i]), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_compiler_leaves_the_layer_outside_of_its_graphs(layer: Any) -> None:
    x = activations()
    compiled = torch.compile(lambda x: layer(x * 2) + 1, backend="eager")
    for rows in (40, 7, 1):
        assert torch.equal(compiled(x[:rows]), layer(x[:rows] * 2) + 1)


# --- errors -----------------------------------------------------------------------------------------------


def test_an_input_that_requires_grad_is_refused(layer: Any) -> None:
    x = activations().requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        layer(x)
    with torch.inference_mode():
        want = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), want)
    assert not [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: x.double(), TypeError, r"float64; .*input\.float\(\)"),
        (lambda x: x.long(), TypeError, r"int64; .*input\.to\(torch\.float32\)"),
        (lambda x: x[:, :100], ValueError, r"shape \(40, 100\), expected \(\.\.\., 384\)"),
        (lambda x: x[0, 0], ValueError, r"shape \(\), expected"),
        (lambda x: x.to_sparse(), TypeError, "nested or sparse"),
        (lambda x: x.to("meta"), TypeError, "the input is on meta, the weights are on cpu"),
    ],
)
def test_other_inputs_are_refused(layer: Any, make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        layer(make(activations()))


def test_other_devices_are_refused(layer: Any) -> None:
    with pytest.raises(TypeError, match="not on meta"):
        copy.deepcopy(layer).to("meta")


def test_bad_arguments() -> None:
    vector = rbe.compress(np.ones(64, np.float32), grade="B")
    with pytest.raises(ValueError, match="needs \\(out_features, in_features\\)"):
        RBELinearModule(vector)
    matrix = rbe.compress(real.layer(0, "attention.self.query.weight"), codes="dense-int4")
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(384,\)"):
        RBELinearModule(matrix, torch.zeros(3))
    with pytest.raises(ValueError, match="activation_bits=4"):
        RBELinearModule(matrix, activation_bits=4)


# --- replace_linear ---------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """Layers that are replaced, and one of each kind that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(384, 384)
        self.blocks = torch.nn.ModuleList([linear(0, f"attention.self.{n}") for n in ("query", "key")])
        self.again = self.blocks[0]
        self.attention = torch.nn.MultiheadAttention(384, 12)
        self.classifier = torch.nn.Linear(384, 2)
        self.hooked = linear(1, "attention.self.query")
        self.hooked.register_forward_hook(lambda *_: None)
        self.normed = torch.nn.utils.parametrizations.weight_norm(linear(1, "attention.self.key"))
        self.head = torch.nn.Linear(384, 384, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Any) -> Any:
        return self.head(self.again(self.blocks[1](self.blocks[0](x))))


def test_what_is_replaced_and_what_is_left() -> None:
    model = Small()
    table = model.table.weight
    result = replace_linear(model, grade="A", skip=["blocks.1"])
    assert result.module is model
    assert set(result.layers) == {"blocks.0"}
    assert result.left["blocks.1"] == "skip"
    assert result.left["head"] == "its weight is table.weight too"
    assert "subclass" in result.left["attention.out_proj"]
    assert "one block" in result.left["classifier"]
    assert result.left["hooked"] == "it has hooks"
    assert "normed" in result.left
    assert isinstance(model.again, RBELinearModule)
    assert model.again is model.blocks[0]  # one module under two names stays one
    assert model.head.weight is model.table.weight is table
    assert result.dense_bytes == 384 * 384 * 4
    assert result.layers["blocks.0"].stored_bytes == model.again.compressed.nbytes
    assert str(result).startswith("1 Linear layers replaced: 0.59 MB of weights are now 0.1")
    assert "left dense: head (its weight is table.weight too)" in str(result)
    with torch.inference_mode():
        assert model(torch.randn(2, 384)).shape == (2, 384)


def test_a_tied_layer_is_replaced_once_it_is_untied() -> None:
    model = Small()
    model.head.weight = torch.nn.Parameter(model.table.weight.detach().clone())
    assert "head" in replace_linear(model, grade="B", skip="blocks.*").layers


def test_memory_shared_by_two_parameters_is_a_tie() -> None:
    model = torch.nn.Sequential(linear(0, "attention.self.query"), linear(0, "attention.self.key"))
    model[1].weight = torch.nn.Parameter(model[0].weight.detach())
    assert set(replace_linear(model, grade="B").left) == {"0", "1"}


def test_patterns_and_targets_are_checked() -> None:
    model = FFN()
    before = dict(model.named_modules())
    for options, words in (
        ({"grade": "A", "skip": ["lm_head"]}, "'lm_head', which matches no Linear; there are up, down"),
        ({}, "no target"),
        ({"grade": "A", "ratio": 4}, "up: grade and ratio are both given"),
        ({"grade": "A", "calibrate": list}, "calibrate= needs ratio="),
        ({"ratio": 8, "codes": "dense-int4", "calibrate": list}, "takes no grade"),
        ({"ratio": 8, "calibrate": list}, "ran no Linear layer"),
        ({"ratio": 8, "transform": "dwt-bior3.1", "calibrate": [activations()]}, "not orthonormal"),
        ({"ratio": 1e5}, "skip=\\['up'\\]"),
        ({"ratio": 1e5, "calibrate": [activations()]}, "use a lower ratio .skip=\\['up'\\]"),
        ({"grade": "A", "activation_bits": 4}, "activation_bits=4"),
        ({"density": 0.5, "activation_bits": 8}, "up: .*only dense and grid codes .*skip=\\['up'\\]"),
    ):
        with pytest.raises(ValueError, match=words):
            replace_linear(model, **options)
    assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match=r"use RBELinearModule\.from_linear"):
        replace_linear(model.up, grade="A")
    with torch.no_grad():
        model.down.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="down: array holds NaN"):
        replace_linear(model, grade="B")
    assert dict(model.named_modules()) == before  # `up` too, which had been compressed by then
    with pytest.raises(TypeError, match=r"up: the weight has dtype torch.float64; .*model\.float\(\)"):
        replace_linear(FFN().double(), grade="A")
    with pytest.raises(TypeError, match="meta"):
        replace_linear(FFN().to("meta"), grade="A")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_of_any_dtype(dtype: str) -> None:
    model = FFN().to(getattr(torch, dtype)).eval()
    x = activations().to(getattr(torch, dtype))
    with torch.inference_mode():
        want = model(x).float()
        result = replace_linear(model, grade="S")
        error = (model(x).float() - want).norm() / want.norm()
    assert error < {"float32": 4e-3, "float16": 4e-3, "bfloat16": 1e-2}[dtype]
    assert result.dense_bytes == 2 * 384 * 1536 * (4 if dtype == "float32" else 2)
    assert model.up.weight.dtype is model.up.bias.dtype is x.dtype
    assert model.up.weight.shape == (1536, 384)


def test_transformer_encoders_of_pytorch_call_the_layers() -> None:
    """Their fused path would read the weights instead."""
    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
    layer.linear1, layer.linear2 = linear(3, "intermediate.dense"), linear(3, "output.dense")
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    x = activations().reshape(4, 10, 384)
    padding = torch.arange(10) >= torch.tensor([10, 3, 7, 1])[:, None]
    with torch.inference_mode():
        want = model(x, src_key_padding_mask=padding)
        replace_linear(model, grade="S")
        calls: list[Any] = []
        model.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
        got = model(x, src_key_padding_mask=padding)
    assert calls
    assert (got - want)[~padding].norm() / want[~padding].norm() < 4e-3


# --- calibration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [8, 12])
def test_calibration_beats_rounding_at_the_same_bytes(ratio: float) -> None:
    x = torch.from_numpy(states())
    half = len(x) // 2
    model = FFN().eval()
    plain, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    rounded = replace_linear(plain, ratio=ratio)
    result = replace_linear(calibrated, ratio=ratio, calibrate=list(x[:half].split(64)))
    assert result.stored_bytes <= rounded.stored_bytes * 1.001
    assert all(layer.calibration_rows == half for layer in result.layers.values())
    with torch.inference_mode():
        want, mean = model(x[half:]), model(x[:half]).mean(0)
        errors = [float((m(x[half:]) - want).norm() / (want - mean).norm()) for m in (plain, calibrated)]
    assert errors[1] < 0.6 * errors[0], errors
    check(calibrated.up, x[:40])


def test_ways_to_run_the_examples() -> None:
    x = activations(32)
    want = FFN()
    replace_linear(want, ratio=6, calibrate=[x])
    for examples in (
        lambda model: lambda: model(x),
        lambda model: [(x, 2.0)],
        lambda model: [{"x": x, "scale": 2.0}],
        lambda model: iter([x[:8], x[8:]]),
    ):
        model = FFN()
        model.up.train(False)
        replace_linear(model, ratio=6, calibrate=examples(model))
        assert model.training
        assert not model.up.training
        assert model.down.training
        for a, b in ((model.up, want.up), (model.down, want.down)):
            # the sums of float32 products have another order
            assert np.abs(a.compressed.decode() - b.compressed.decode()).max() < 0.05


def test_a_layer_that_the_examples_do_not_reach_is_rounded_plainly() -> None:
    model = FFN()
    model.unused = linear(0, "attention.self.query")
    result = replace_linear(model, ratio=6, calibrate=[activations(32)])
    assert result.layers["unused"].calibration_rows == 0
    assert model.unused.compressed.codes.name.startswith("dense")
    assert model.up.compressed.codes.name.startswith("grid")


def test_calibration_leaves_no_hook_behind() -> None:
    model = FFN()
    with pytest.raises(ValueError, match="an input of up holds NaN or Inf"):
        replace_linear(model, ratio=6, calibrate=[torch.full((2, 384), float("inf"))])
    assert type(model.up) is torch.nn.Linear
    assert not model.up._forward_pre_hooks
    assert model.training


# --- states -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replaced() -> Any:
    model = FFN().eval()
    replace_linear(model, ratio=6, calibrate=[activations()], activation_bits=8)
    return model


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_state_dicts(replaced: Any) -> None:
    """They hold tensors alone, so that torch.load needs no pickled code and safetensors takes them."""
    state = torch.load(saved(replaced.state_dict()), weights_only=True)
    assert set(state) == {"up._extra_state", "up.bias", "down._extra_state", "down.bias"}
    x, want = activations(), replaced(activations())
    fresh = FFN()
    assert not load_state_dict(fresh, state).missing_keys
    assert torch.equal(fresh(x), want)
    assert fresh.up.activation_bits == 8
    again = FFN()
    replace_linear(again, codes="dense-int2")
    again.load_state_dict(state)  # into modules that are replaced already
    assert torch.equal(again(x), want)
    from safetensors.torch import load, save

    third = FFN()
    load_state_dict(third, load(save(state)))
    assert torch.equal(third(x), want)


def test_a_skeleton_without_memory_is_loaded(replaced: Any) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(384, 1536))
    state = {key.replace("up", "0"): value for key, value in replaced.state_dict().items() if "up" in key}
    load_state_dict(model, state)
    assert torch.equal(model(activations()), replaced.up(activations()))


def test_a_dense_state_is_refused(replaced: Any) -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "up._extra_state"'):
        copy.deepcopy(replaced).load_state_dict(FFN().state_dict())


def test_copies_and_pickles(replaced: Any) -> None:
    x, want = activations(), replaced(activations())
    twin = copy.deepcopy(replaced)
    assert torch.equal(twin(x), want)
    assert not np.shares_memory(twin.up.compressed.arrays["stream"], replaced.up.compressed.arrays["stream"])
    with torch.no_grad():
        twin.up.bias += 1
    assert torch.equal(replaced(x), want)
    whole = torch.load(saved(replaced), weights_only=False)
    assert torch.equal(whole(x), want)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(saved(replaced), weights_only=True)


def as_state(data: bytes) -> Any:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def bad_states(module: Any) -> Iterator[tuple[Any, str]]:
    weight, good = module.compressed, module.get_extra_state()
    data = good.numpy().tobytes()
    yield None, "expected the bytes"
    yield data, "expected the bytes"
    yield good.to(torch.int8), "expected the bytes"
    yield good.reshape(1, -1), "expected the bytes"
    yield as_state(b""), "too few"
    yield as_state(data[:-1]), "the extra state"
    yield as_state(data + b"\0"), "the extra state"
    yield as_state(data.replace(b"grid", b"grin")), "the extra state"
    first = len(data) - weight.codes.stream.data.size  # bytes are the last arrays of a file
    yield as_state(data[:first] + bytes(8) + data[first + 8 :]), "stream"
    settings = {"activation_bits": None}
    yield as_state(to_bytes({"weight": weight, "bias": np.zeros(3)}, settings)), "other tensors"
    yield as_state(to_bytes({"w": weight}, settings)), "other tensors"
    yield as_state(to_bytes({"weight": weight.decode()}, settings)), "other tensors"
    yield as_state(to_bytes({"weight": weight}, {})), "settings"
    yield as_state(to_bytes({"weight": weight}, {"activation_bits": "8"})), "settings"
    yield as_state(to_bytes({"weight": weight}, {"activation_bits": 4})), "activation_bits=4"
    sparse = rbe.compress(real.layer(0, "intermediate.dense.weight"), density=0.5, basis=False)
    yield as_state(to_bytes({"weight": sparse}, {"activation_bits": 8})), "only dense and grid codes"
    other = rbe.compress(real.layer(0, "attention.self.query.weight"), codes="dense-int2")
    yield as_state(to_bytes({"weight": other}, settings)), "expected \\(1536, 384\\)"


def test_bad_states_are_refused(replaced: Any) -> None:
    state, dense = replaced.state_dict(), FFN()
    before, x = dict(dense.named_modules()), activations()
    want = replaced(x)
    for bad, words in bad_states(replaced.up):
        for load in (replaced.load_state_dict, lambda state: load_state_dict(dense, state)):
            with pytest.raises(ValueError, match=words):
                load({**state, "up._extra_state": bad})
    assert torch.equal(replaced(x), want)
    assert dict(dense.named_modules()) == before


# --- devices ----------------------------------------------------------------------------------------------


def test_weights_on_a_gpu_have_the_same_state(layer: Any) -> None:
    module, want = copy.deepcopy(layer), layer.get_extra_state()
    with stand_in.installed():
        module._move("cuda:1")
        assert module.compressed.device == "cuda:1"
        assert torch.equal(module.get_extra_state(), want)
        module._move("cpu")
    check(module, activations())


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cpu = False

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def detach(self) -> OnGpu:
        return self

    contiguous = detach


def test_activations_are_rounded_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = linear(3, "intermediate.dense", bias=False), activations(5)
    module = RBELinearModule.from_linear(dense, codes="dense-int4", transform="none", activation_bits=8)
    want = module(x).numpy()
    monkeypatch.setattr(linear_module, "current_stream", lambda _: nullcontext())
    monkeypatch.setattr(
        linear_module, "as_array", lambda t: getattr(t, "tensor", t).numpy().view(stand_in.ndarray)
    )
    monkeypatch.setattr(module, "_check", lambda _: None)  # of one device
    with stand_in.installed():
        module._move("cuda:0")
        y = module._matmul(OnGpu(x)).numpy()
    assert relative_error(y, want.astype(np.float64), OPS["linear"].tolerances["float32"].floor) <= 1e-6


def test_gpu_work_goes_to_the_current_stream_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    def context(kind: str) -> Any:
        @contextmanager
        def manager(*arguments: Any) -> Iterator[None]:
            entered.append((kind, *arguments))
            yield

        return manager

    cuda = SimpleNamespace(Device=context("device"), ExternalStream=context("stream"))
    monkeypatch.setitem(vars(dispatch.CUDA), "xp", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=1234))
    with tensors.current_stream(torch.device("cpu")):
        assert not entered
    with tensors.current_stream(torch.device("cuda:1")):
        assert entered == [("device", 1), ("stream", 1234, 1)]


def test_pytorch_is_imported_by_the_integration_alone() -> None:
    code = (
        "import sys, rbe_gpu, rbe_gpu.integrations, rbe_gpu.models.load, rbe_gpu.layers\n"
        "print('torch' in sys.modules)\n"
        "import rbe_gpu.integrations.torch\n"
        "print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\nTrue False\n"
