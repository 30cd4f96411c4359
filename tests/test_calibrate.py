"""Calibrated encoding: error feedback, grids, allocation, and what they do to real outputs."""

from __future__ import annotations

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import feedback as cal
from rbe_gpu import transforms
from rbe_gpu.codecs import entropy

from . import real
from .compressed import relative


def _moments(x, other=None):
    m = cal.Moments(x.shape[1])
    half = len(x) // 2
    for part in (slice(0, half), slice(half, None)):
        m.add(x[part], x[part] if other is None else other[part])
    return m


@pytest.fixture(scope="module")
def inputs():
    """Hidden vectors of 48 real texts, what the first layer's products read."""
    ids, lengths = real.batch(48)
    states = rbe.load(real.MODEL_DIR).forward(ids, lengths, all_hidden_states=True)[1]
    return np.concatenate([s[:n] for s, n in zip(states, lengths, strict=True)]).astype(np.float32)


@pytest.fixture(scope="module")
def weight():
    return real.layer(1, "attention.self.value.weight")


def test_moments_are_the_sums(inputs):
    other = np.round(inputs, 1)
    m = _moments(inputs, other)
    assert m.count == len(inputs)
    x, y = inputs.astype(np.float64), other.astype(np.float64)
    assert relative(m.compressed, y.T @ y) < 1e-6
    assert relative(m.cross, x.T @ y) < 1e-6
    assert relative(m.mean_dense, x.sum(0)) < 1e-9
    assert relative(m.mean_compressed, y.sum(0)) < 1e-9


@pytest.mark.parametrize("transform", ["dct", "dwt", "none"])
def test_geometry_factors_the_inverse(inputs, transform):
    transform = transforms.canonical_transform(transform)
    m = _moments(inputs)
    geo = cal.geometry(m, transform)
    h = m.compressed / m.count
    h += cal.DAMPING * np.trace(h) / len(h) * np.eye(len(h))
    s = np.kron(np.eye(len(h) // 64), transforms.synthesis(transform, 64))
    moved = (s.T @ h @ s)[np.ix_(geo.order, geo.order)]
    upper = geo.upper.astype(np.float64)
    np.testing.assert_allclose(upper.T @ upper @ moved, np.eye(len(h)), atol=5e-4)  # U is float32
    assert np.all(np.tril(geo.upper, -1) == 0)
    assert np.exp(np.mean(np.log(geo.step))) == pytest.approx(1.0)


def test_feedback_beats_rounding_at_the_same_grid(inputs, weight):
    """The same grid, coefficients rounded one by one: the outputs are further off."""
    geo = cal.geometry(_moments(inputs))
    step = float(weight.std())
    m = cal.quantize_matrix(weight, geo, step)
    steps = np.empty(384)
    steps[geo.order] = geo.step * step
    s = transforms.synthesis("dct", 64)
    blocks = np.kron(np.eye(6), s)
    c = blocks.T @ weight.astype(np.float64) @ blocks
    rounded = blocks @ (np.round(c / steps) * steps) @ blocks.T
    x = inputs.astype(np.float64)
    exact = x @ weight.T.astype(np.float64)
    with_feedback = relative(x @ m.decode().T.astype(np.float64), exact)
    assert with_feedback < 0.7 * relative(x @ rounded.T, exact)


def test_calibrated_beats_plain_codes_at_equal_bytes(inputs, weight):
    geo = cal.geometry(_moments(inputs))
    plain = rbe.compress(weight, codes="dense-int3")
    step = float(weight.std())
    while (m := cal.quantize_matrix(weight, geo, step)).nbytes > plain.nbytes:
        step *= 1.05
    x = inputs.astype(np.float64)
    exact = x @ weight.T.astype(np.float64)
    errors = [relative(x @ w.decode().T.astype(np.float64), exact) for w in (m, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_every_column_adds_the_same_output_error(inputs, weight):
    """Steps are proportional to U_ii: after feedback, each column's own share of the error is about equal."""
    geo = cal.geometry(_moments(inputs))
    c = cal.target_coefficients(weight, geo)
    step = 0.25 * float(weight.std())
    codes, steps = cal.round_with_feedback(c, geo, step, dead=0.0, shrink=0.0)
    share = steps / np.diag(geo.upper)
    assert share.max() / share.min() < 1.01  # up to float16
    # what is left in the ordered columns, pushed through H', is white: U^-T maps it to independent errors
    left = (c - codes * steps).astype(np.float64)
    white = left @ np.linalg.inv(geo.upper.astype(np.float64))
    power = (white**2).mean(axis=0)
    assert power.max() / power.min() < 4  # 384 samples a column of a uniform error
    np.testing.assert_allclose(np.sqrt(power.mean() * 12), share.mean(), rtol=0.05)


def test_the_target_makes_good_what_inputs_lost(inputs, weight):
    """With inputs that are off, the weight that is aimed at gives better outputs than the weight itself."""
    blurred = np.ascontiguousarray(rbe.compress(inputs, codes="dense-int2").decode())
    m = _moments(inputs, blurred)
    geo = cal.geometry(m)
    exact = inputs.astype(np.float64) @ weight.T
    aimed = weight @ geo.target
    assert relative(blurred @ aimed.T, exact) < 0.9 * relative(blurred @ weight.T, exact)


def test_bias_keeps_the_mean(inputs, weight):
    bias = real.layer(1, "attention.self.value.bias")
    blurred = np.round(inputs, 1)
    m = _moments(inputs, blurred)
    decoded = cal.quantize_matrix(weight, cal.geometry(m), float(weight.std())).decode()
    fixed = cal.corrected_bias(weight, decoded, bias, m)
    mean = (inputs.astype(np.float64) @ weight.T + bias).mean(axis=0)
    np.testing.assert_allclose((blurred.astype(np.float64) @ decoded.T + fixed).mean(axis=0), mean, atol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(70, 100), (384, 65), (1, 64)])
def test_ragged_shapes(rows, cols, inputs, weight):
    x = np.ascontiguousarray(inputs[:, :cols])
    w = np.ascontiguousarray(weight[:rows, :cols])
    m = cal.quantize_matrix(w, cal.geometry(_moments(x)), 0.03 * float(w.std()))
    assert m.shape == (rows, cols)
    exact = x.astype(np.float64) @ w.T
    assert relative(x @ m.decode().T, exact) < 0.05


def test_entropy_is_the_textbook_sum():
    codes = np.repeat(np.array([[0], [1], [0], [-1]], np.int8), 8, axis=1)
    assert cal.stream_bits(codes, classes=1) == pytest.approx(1.5 + 0.04 * 1.5 / 1.53)
    assert cal.stream_bits(np.zeros((4, 8), np.int8)) == 0.0


@pytest.mark.parametrize("step", [0.04, 0.2, 0.8, 2.0, 5.0])
def test_the_estimate_of_a_stream_is_near_it(weight, step):
    """From 7 bits to nearly none: what the allocation plans with is what the file then takes."""
    w = weight / weight.std()
    codes = np.clip(np.rint(w / step), -127, 127).astype(np.int8)
    stored = 8 * entropy.compress_integers(codes).data.size / codes.size
    assert cal.stream_bits(codes) == pytest.approx(stored, rel=0.05, abs=0.015)  # small: headers count


def test_table_rows_follow_their_scales():
    table = real.weight("embeddings.word_embeddings.weight")[1000:1400]
    scales = cal.row_scales(table, 0.5)
    assert scales.mean() == pytest.approx(1.0, rel=1e-3)
    m = cal.quantize_table(table, 0.3 * float(table.std()), scales)
    assert isinstance(m, rbe.RBEVectors)
    error = np.linalg.norm(m.decode() - table, axis=1) / scales
    assert error.max() / error.min() < 1.6
    assert m.error_report(table).relative_error < 0.12


def test_rows_that_are_read_often_take_finer_steps():
    table = real.weight("embeddings.word_embeddings.weight")[1000:1400]
    counts = np.where(np.arange(400) < 40, 10_000, 0)
    plain, weighted = cal.row_scales(table, 0.5), cal.row_scales(table, 0.5, counts)
    assert weighted.mean() == pytest.approx(1.0, rel=1e-3)
    ratio = (weighted / plain) / (weighted / plain)[-1]
    np.testing.assert_allclose(ratio[40:], 1.0, rtol=2e-3)  # float16
    np.testing.assert_allclose(ratio[:40], (10_002 / 2) ** -0.25, rtol=2e-3)
    np.testing.assert_array_equal(cal.row_scales(table, 0.5, np.full(400, 7)), plain)


def test_errors(inputs):
    with pytest.raises(ValueError, match="not orthonormal"):
        cal.geometry(_moments(inputs), "dwt-bior3.1")
    with pytest.raises(ValueError, match="never used"):
        cal.geometry(_moments(np.zeros_like(inputs)))
